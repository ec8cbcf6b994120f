"""Launchers that are killed, at several moments: what they started ends, and what was trained is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ddk_ds.launcher import free_port
from ddk_ds.train.checkpoint.checkpoint_files import newest_checkpoint
from tests.e2e.test_run import wait_for_step
from tools.bench.small_run import ROOT, write_config

SCRIPTS = Path(sys.executable).parent
DDK = "import sys; from ddk_ds.commands.console import main; sys.exit(main())"
COMMANDS = {
    "deepspeed": [str(SCRIPTS / "deepspeed"), "--num_gpus", "2", "--master_port={port}", "launch/distill.py"],
    "ddk distill": [sys.executable, "-c", DDK, "distill", "--ranks", "2"],
    "torchrun": [str(SCRIPTS / "torchrun"), "--nproc-per-node=2", "--master-port={port}", "launch/distill.py"],
}
# Long enough for a machine at work; a rank looks once a second, and a step and a checkpoint take less than a second.
GONE_S = 150.0


class Started:
    """A launcher and all that it started, known by a variable of their environment."""

    def __init__(self, launcher: str, config: Path, output: Path) -> None:
        self.mark = uuid.uuid4().hex
        command = [word.format(port=free_port()) for word in COMMANDS[launcher]] + ["--config", str(config)]
        with output.open("w") as stream:
            self.process: subprocess.Popen[str] = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"TEST_MARK": self.mark},
                stdout=stream,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def living(self) -> list[psutil.Process]:
        """All its processes."""
        return [process for process in psutil.process_iter() if _mark(process) == self.mark]

    def has(self, word: str) -> psutil.Process | None:
        """A process with that word in its command."""
        return next((process for process in self.living() if word in _words(process)), None)

    def wait_for(self, what: Callable[[], object], timeout_s: float = GONE_S) -> None:
        """Wait; fail after the time."""
        end = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < end, [(p.pid, _words(p)) for p in self.living()]
            time.sleep(0.02)

    def close(self) -> None:
        """Kill what is left."""
        for process in self.living():
            process.kill()
        self.process.wait()


def _mark(process: psutil.Process) -> str | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get("TEST_MARK")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


INNER, RANK = "deepspeed.launcher.launch", "--local_rank=0"
LONG = pytest.mark.long("5 to 30 s a start; one of these kills and tests/unit/test_lifeline.py run always")


@pytest.mark.parametrize(
    ("launcher", "victim", "number", "moment", "code"),
    [
        ("ddk distill", INNER, signal.SIGKILL, "training", 75),
        pytest.param("deepspeed", "", signal.SIGKILL, INNER, -9, marks=LONG),
        pytest.param("deepspeed", "", signal.SIGTERM, "training", -15, marks=LONG),
        pytest.param("deepspeed", "", signal.SIGTERM, RANK, -15, marks=LONG),
        pytest.param("deepspeed", INNER, signal.SIGKILL, RANK, 0, marks=LONG),  # DeepSpeed's own code
        pytest.param("ddk distill", "", signal.SIGKILL, "training", -9, marks=LONG),
        pytest.param("ddk distill", "", signal.SIGKILL, RANK, -9, marks=LONG),
        pytest.param("ddk distill", "", signal.SIGTERM, RANK, 130, marks=LONG),
        pytest.param("ddk distill", INNER, signal.SIGKILL, INNER, 1, marks=LONG),
        pytest.param("torchrun", "", signal.SIGKILL, "training", -9, marks=LONG),
    ],
)
def test_a_killed_launcher_leaves_no_process(
    workspace: Path, tmp_path: Path, launcher: str, victim: str, number: signal.Signals, moment: str, code: int
) -> None:
    """Kill the launcher itself, or the one whose command has the word `victim`, when a process `moment` appears."""
    options = {"stop": {"steps": 100_000}, "mixture": {"interval_steps": 100_000}}
    config = write_config(workspace, tmp_path, checkpoint={"every_steps": 100_000}, **options)
    run_dir = tmp_path / "runs/run"
    started = Started(launcher, config, tmp_path / "output.txt")
    try:
        if moment == "training":
            wait_for_step(started.process, run_dir / "ledger.jsonl", 3)
        else:
            started.wait_for(lambda: started.has(moment))
        killed = started.has(victim) if victim else psutil.Process(started.process.pid)
        assert killed is not None
        killed.send_signal(number)
        assert started.process.wait(GONE_S) == code, (tmp_path / "output.txt").read_text()[-3000:]
        started.wait_for(lambda: not started.living())
    finally:
        started.close()
    output = (tmp_path / "output.txt").read_text()
    saved = newest_checkpoint(run_dir)
    if moment == "training":
        assert "and saved at step" in output and saved is not None and "Traceback" not in output, output[-3000:]
    else:
        assert saved is None
