"""The engines of a preparation in parts: processes that are killed, options, and what a missing one says."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ddk_ds.commands import prepare_command
from ddk_ds.data.engines import make_engine
from ddk_ds.data.prepare_parts import prepare_in_parts
from ddk_ds.data.recipe import load_recipe
from ddk_ds.errors import ConfigError
from tests.unit.data.corpus import PLAN
from tests.unit.data.test_data_prepare import files_of

KILLS = 2


def kill_parts(root: Path, kills: list[int], ended: threading.Event) -> None:
    """SIGKILL a part's process each time that some results are new, until there were KILLS."""
    source, seen = random.Random(0), 0
    while len(kills) < KILLS and not ended.wait(0.01):
        found = sum(len(list(root.glob(f"{stage}/*.json"))) for stage in ("keys", "tokens", "shards"))
        running = multiprocessing.active_children()
        if running and found >= seen + 2:
            process = source.choice(running)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            kills.append(process.pid)
            seen = found


@pytest.mark.long("a process for each part of three passes, and for each that was killed, 20 seconds")
def test_parts_that_are_killed_run_again(
    recipe_path: Path, tokenizer_dir: Path, tmp_path: Path, prepared: Path
) -> None:
    kills: list[int] = []
    ended = threading.Event()
    killer = threading.Thread(target=kill_parts, args=(tmp_path / ".out.partial", kills, ended))
    killer.start()
    try:
        engine = make_engine("local", 2, {})
        prepare_in_parts(load_recipe(recipe_path), tokenizer_dir, tmp_path / "out", PLAN, engine, 3, block_bytes=600)
    finally:
        ended.set()
        killer.join()
    assert len(kills) == KILLS
    assert files_of(tmp_path / "out") == files_of(prepared)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.long("the command and two processes, 15 seconds")
def test_a_killed_command_takes_its_parts_along_and_goes_on(
    recipe_path: Path, tokenizer_dir: Path, tmp_path: Path, prepared: Path
) -> None:
    command = [sys.executable, "-c", "import sys; from ddk_ds.commands.prepare_command import main; sys.exit(main())"]
    command += ["--recipe", str(recipe_path), "--tokenizer", str(tokenizer_dir), "--out", str(tmp_path / "out")]
    command += ["--sequence-length", "32", "--validation-samples", "7", "--engine", "local", "--parts", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob(".out.partial/keys/*.json")):
            assert process.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < end, "parts outlive a killed command"
        time.sleep(0.05)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 domains, 32 tokens a sample" in done.stdout
    assert files_of(tmp_path / "out") == files_of(prepared)


def test_options_of_the_executors_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"--engine-option partitoin: the engine slurm has .*partition.*, time"):
        make_engine("slurm", -1, {"partitoin": "cpu"})
    with pytest.raises(ConfigError, match=r"--engine slurm needs --engine-option partition=\.\.\."):
        make_engine("slurm", -1, {"time": "01:00:00"})
    with pytest.raises(ConfigError, match=r"--engine-option tasks: the engine slurm has"):
        make_engine("slurm", -1, {"tasks": "3"})
    with pytest.raises(ConfigError, match=r"--engine-option time: the engine local has no options"):
        make_engine("local", 1, {"time": "3"})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--parts", "3"], "--parts is of a preparation in parts: give --engine too"),
        (["--engine-option", "time=3"], "--engine-option is of a preparation in parts: give --engine too"),
        (["--engine", "ray"], "--engine ray needs --parts, the number of its tasks"),
        (["--engine", "slurm", "--parts", "2", "--engine-option", "cpu"], "--engine-option cpu: write it as key=value"),
    ],
)
def test_options_of_the_command_that_do_not_fit_are_named(
    recipe_path: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    options = ["--recipe", str(recipe_path), "--tokenizer", str(tokenizer_dir), "--out", str(tmp_path / "out")]
    assert prepare_command.main([*options, "--sequence-length", "32", *more]) == 2
    assert message in capsys.readouterr().err
