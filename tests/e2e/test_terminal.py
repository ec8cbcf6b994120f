"""One Ctrl-C in a real terminal: what a person sees, the exit code in the shell, and that nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.launcher import free_port
from ddk_ds.run_files import read_ledger
from ddk_ds.train.checkpoint.checkpoint_files import newest_checkpoint
from tests.e2e.conftest import WHOLE
from tests.terminal import CTRL_C, CTRL_Z, Terminal
from tests.wandb_file import wandb_series
from tools.bench.small_run import ROOT, without_clock, write_config

DDK = [sys.executable, "-c", "import sys; from ddk_ds.commands.console import main; sys.exit(main())"]
SCRIPTS = Path(sys.executable).parent
OFFLINE: dict[str, Any] = {"monitor": {"wandb_project": "ddk", "every_s": 600.0}}


def start(command: list[str], config: Path, **options: Any) -> Terminal:
    """Start two ranks in a terminal; W&B keeps its numbers on the disk."""
    environment = {**os.environ, "WANDB_MODE": "offline", "TERM": "xterm-256color"}
    words = [*command, "--config", str(config)]
    return Terminal(words, cwd=ROOT, env=environment, **options)


def by_ddk(config: Path) -> Terminal:
    return start([*DDK, "distill", "--ranks", "2"], config)


def interrupted(terminal: Terminal, run_dir: Path, *, step: int) -> int:
    """Press Ctrl-C when the ledger has that step; the exit code as the shell shows it."""
    try:
        terminal.wait_for_step(run_dir / "ledger.jsonl", step)
        terminal.press(CTRL_C)
        return terminal.code()
    finally:
        terminal.close()


def check_saved(terminal: Terminal, run_dir: Path) -> None:
    """Assert that the run says the signal's own name, has a checkpoint, and that W&B has every number."""
    last = read_ledger(run_dir)[-1]["step"]
    said = " ".join(terminal.text.split())
    assert f"interrupted by SIGINT and saved at step {last}: start the same command again to continue" in said
    saved = newest_checkpoint(run_dir)
    assert saved is not None and saved[1].step == last
    assert wandb_series(run_dir, "loss/total") == losses(run_dir)
    assert "ConnectionResetError" not in said


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_ledger(run_dir) if line["kind"] == "step"}


def signals(run_dir: Path) -> list[str]:
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event["signal"] for event in events if event["event"] == "interrupted"]


@pytest.mark.long("three starts in a terminal; test_run.py has a kill and a resumption")
def test_ddk_distill(workspace: Path, tmp_path: Path, whole: Path) -> None:
    """Ctrl-C; started again, the terminal is closed; started again, stopped by Ctrl-Z for a while, to the end."""
    config = write_config(workspace, tmp_path, name="cut", **WHOLE, **OFFLINE)
    run_dir = tmp_path / "runs/cut"
    terminal = by_ddk(config)
    assert interrupted(terminal, run_dir, step=2) == 75, terminal.text
    assert "Traceback" not in terminal.text and "KeyboardInterrupt" not in terminal.text
    check_saved(terminal, run_dir)

    terminal = by_ddk(config)
    terminal.wait_for_step(run_dir / "ledger.jsonl", 7)
    terminal.hang_up()
    assert terminal.code() == 75

    terminal = by_ddk(config)
    try:
        terminal.wait_for_step(run_dir / "ledger.jsonl", 10)
        terminal.press(CTRL_Z)
        terminal.wait_for(terminal.is_stopped)
        size = (run_dir / "ledger.jsonl").stat().st_size
        time.sleep(2.0)
        assert (run_dir / "ledger.jsonl").stat().st_size == size, "the ranks went on"
        terminal.resume()
        assert terminal.code() == 0, terminal.text
    finally:
        terminal.close()
    assert any(line.startswith("step 12/12  ETA 0:00:") for line in terminal.lines), terminal.text
    for part in ("measuring the student", "exporting the student"):
        assert any(line.startswith(part) for line in terminal.lines), terminal.text
    assert without_clock(run_dir) == without_clock(whole)
    assert signals(run_dir) == ["SIGINT", "SIGHUP"]


@pytest.mark.long("30 s each; the launchers' own part, which only a new version of them changes")
@pytest.mark.parametrize(("launcher", "code"), [("deepspeed", 130), ("torchrun", 1)])
def test_launchers_of_others(workspace: Path, tmp_path: Path, launcher: str, code: int) -> None:
    """They print a traceback of their own and have their own codes (docs/guide.md); the run is saved all the same."""
    words = {
        "deepspeed": ["--num_gpus", "2", "--master_port", str(free_port())],
        "torchrun": ["--nproc-per-node", "2", "--master-port", str(free_port())],
    }
    config = write_config(workspace, tmp_path, name="cut", stop={"steps": 400}, **OFFLINE)
    run_dir = tmp_path / "runs/cut"
    command = [str(SCRIPTS / launcher), *words[launcher], "launch/distill.py"]
    terminal = start(command, config)
    assert interrupted(terminal, run_dir, step=5) == code, terminal.text
    # DeepSpeed's outer launcher does not wait for the ranks.
    end = time.monotonic() + 60
    while time.monotonic() < end and not (signals(run_dir) and wandb_series(run_dir, "loss/total") == losses(run_dir)):
        time.sleep(0.2)
    assert signals(run_dir) == ["SIGINT"] and newest_checkpoint(run_dir)
    assert wandb_series(run_dir, "loss/total") == losses(run_dir)
    assert "ddk_ds/" not in terminal.text, "a traceback of ours"


@pytest.mark.long("one start; torchrun sets the variables that DeepSpeed's launcher sets")
def test_torchrun_gives_the_same_run(workspace: Path, tmp_path: Path, whole: Path) -> None:
    config = write_config(workspace, tmp_path, name="torchrun", **WHOLE)
    command = [str(SCRIPTS / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port())]
    subprocess.run([*command, "launch/distill.py", "--config", str(config)], cwd=ROOT, check=True)
    assert without_clock(tmp_path / "runs/torchrun") == without_clock(whole)
