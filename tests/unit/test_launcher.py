"""A launcher in a process group of its own: what a signal does before there are ranks, and to a run that hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.terminal import hear_signals

ROOT = Path(__file__).parents[2]
START = """
import sys
from ddk_ds import launcher
launcher._LAST_WAIT_S = 1
sys.exit(launcher.run_launcher([sys.executable, "-c", sys.argv[1]]))
"""
READY = "import signal, sys, time; print('ready', flush=True); "


def launched(script: str, *signals: int) -> int:
    """Run a stand-in of the launcher, send signals to the process that runs it, and return that one's exit code."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(0.3)
        return process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(0)", 0), ("sys.exit(75)", 75), ("signal.raise_signal(signal.SIGKILL)", 137)]
)
def test_the_exit_code_is_the_runs(end: str, code: int) -> None:
    assert launched(READY + end) == code


def test_before_there_are_ranks_one_ctrl_c_ends_at_once() -> None:
    assert launched(READY + "time.sleep(100)", signal.SIGINT) == 130


def test_what_does_not_answer_a_second_ctrl_c_is_killed() -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    began = time.monotonic()
    assert launched(deaf.join(["import signal; ", READY]) + "time.sleep(100)", signal.SIGINT, signal.SIGINT) == 130
    assert time.monotonic() - began < 60
