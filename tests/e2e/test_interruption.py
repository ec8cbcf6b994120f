"""Signals to a run under the real launcher: it saves and ends with a code of its own, and goes on as if undisturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import WHOLE
from tests.e2e.test_run import forked, start, wait_for_step
from tools.bench.small_run import without_clock, write_config


def launcher_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The node's launcher, the parent of the ranks."""
    children = psutil.Process(process.pid).children()
    return next(child for child in children if "deepspeed.launcher.launch" in child.cmdline())


def rank_of(process: subprocess.Popen[str], local_rank: int) -> psutil.Process:
    """One training process. What a rank has forked looks like it, but for its parent."""
    children = launcher_of(process).children()
    return next(child for child in children if f"--local_rank={local_rank}" in child.cmdline())


def interrupt(config: Path, ledger: Path, step: int, send: str) -> tuple[int, str]:
    """Start the run and send a signal when its ledger has `step`; the exit code and what was printed."""
    process = start(config)
    try:
        wait_for_step(process, ledger, step)
        if send == "USR1 to one rank":
            rank_of(process, 1).send_signal(signal.SIGUSR1)
        else:  # as from a terminal, or from a scheduler that ends the whole job
            launcher = next(
                c for c in psutil.Process(process.pid).children() if "deepspeed.launcher.launch" in c.cmdline()
            )
            launcher.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.mark.long("two starts of the launcher; test_run.py kills one and resumes it")
def test_interrupted_twice_and_resumed(workspace: Path, tmp_path: Path, whole: Path) -> None:
    config = write_config(workspace, tmp_path, name="cut", **WHOLE)
    run_dir = tmp_path / "runs/cut"
    code, output = interrupt(config, run_dir / "ledger.jsonl", 2, "USR1 to one rank")
    assert code == 75, output[-3000:]
    assert "interrupted by SIGUSR1 and saved at step" in output and "Traceback" not in output
    code, output = interrupt(config, run_dir / "ledger.jsonl", 6, "TERM to the launcher")
    assert code != 0 and "interrupted by SIGTERM and saved at step" in output and "Traceback" not in output
    assert "resumed from" in forked(config)
    assert without_clock(run_dir) == without_clock(whole)
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [e["signal"] for e in events if e["event"] == "interrupted"] == ["SIGUSR1", "SIGTERM"]
    assert not list((run_dir / "checkpoints").glob(".partial-*"))
