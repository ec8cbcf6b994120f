"""A launcher in a process group of its own: what a signal does before there are ranks, and to a run that hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddk_ds.lifeline import look_up
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


# A launcher that is killed while its rank saves: the rank is left behind, in the launcher's process group.
LEAVES = """
import os, signal, sys, time
launcher = os.getpid()
if os.fork() == 0:
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    while os.getppid() == launcher:
        time.sleep(0.01)
    print("ready", flush=True)
    time.sleep({seconds})
    sys.exit({code})
{end}
"""


@pytest.mark.parametrize(
    ("end", "rank_code", "code"),
    [("os._exit(0)", 75, 75), ("os._exit(0)", 9, 9), ("os._exit(0)", 0, 0), ("os.kill(os.getpid(), 9)", 75, 75)],
)
def test_the_exit_code_is_that_of_ranks_whose_launcher_was_killed(end: str, rank_code: int, code: int) -> None:
    assert launched(LEAVES.format(end=end, code=rank_code, seconds=0.5)) == code


def test_ranks_whose_launcher_was_killed_still_get_signals() -> None:
    assert launched(LEAVES.format(end="os._exit(0)", code=0, seconds=100), signal.SIGUSR1) == 75


def test_a_launcher_ends_with_the_process_that_runs_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    write = f"import os; open({str(pid)!r}, 'w').write(str(os.getpid())); "
    assert launched(write + READY + "time.sleep(100)", signal.SIGKILL) == -signal.SIGKILL
    end = time.monotonic() + 30
    while look_up(int(pid.read_text())) is not None:
        assert time.monotonic() < end, "the launcher lives"
        time.sleep(0.05)
