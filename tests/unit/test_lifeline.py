"""A rank ends when a launcher above it ends, at any moment: small processes stand for the launchers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ddk_ds.lifeline import look_up

ROOT = Path(__file__).parents[2]
# Each process writes its number to the file `pids`, starts the next one as DeepSpeed or torchrun do, and waits for it.
CHAIN = """
import os, subprocess, sys, time
with open("pids", "a") as pids:
    pids.write(f"{os.getpid()} ")
rest = int(sys.argv[1])
if rest:
    time.sleep(float(sys.argv[2]))
    command = [sys.executable, __file__, str(rest - 1), sys.argv[2]]
    subprocess.run(command, start_new_session="TORCHELASTIC_RUN_ID" in os.environ)
else:
    from ddk_ds.lifeline import follow_launcher
    follow_launcher()
    open("follows", "w").close()
    time.sleep(100)
"""


@contextmanager
def chain(folder: Path, length: int, variable: str, slow_s: float = 0.0) -> Iterator[list[int]]:
    """Start a rank below `length` launchers, each of which imports for `slow_s`; their process ids, the rank's last."""
    (folder / "chain.py").write_text(CHAIN)
    env = os.environ | {"PYTHONPATH": str(ROOT), variable: "1", "RANK": "0"}
    process = subprocess.Popen(
        [sys.executable, "chain.py", str(length), str(slow_s)], cwd=folder, env=env, start_new_session=True
    )
    pids: list[int] = []
    try:
        expected = length + 1 if not slow_s else length
        wait_until(lambda: len(written(folder)) >= expected and (slow_s > 0 or (folder / "follows").exists()))
        pids = written(folder)
        yield pids
    finally:
        process.kill()
        process.wait()
        for pid in written(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def written(folder: Path) -> list[int]:
    """The process ids so far, the outermost first."""
    path = folder / "pids"
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def wait_until(condition: object, timeout_s: float = 60.0) -> None:
    """Wait; fail after the time."""
    assert callable(condition)
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("killed", [0, 1])
def test_below_deepspeeds_launchers(tmp_path: Path, killed: int, number: signal.Signals) -> None:
    with chain(tmp_path, 2, "CROSS_SIZE") as pids:
        os.kill(pids[killed], number)
        wait_until(lambda: look_up(pids[2]) is None)


def test_below_torchrun(tmp_path: Path) -> None:
    with chain(tmp_path, 1, "TORCHELASTIC_RUN_ID") as pids:
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: look_up(pids[1]) is None)


def test_an_outer_launcher_that_ended_before_the_rank_began(tmp_path: Path) -> None:
    """The inner launcher imports for seconds; if the outer one is killed then, it starts the ranks all the same."""
    with chain(tmp_path, 2, "CROSS_SIZE", slow_s=1.0) as pids:
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: len(written(tmp_path)) == 3)
        rank = written(tmp_path)[2]
        wait_until(lambda: look_up(rank) is None)
        assert not (tmp_path / "follows").exists()


def test_a_rank_whose_launchers_live_goes_on(tmp_path: Path) -> None:
    with chain(tmp_path, 2, "CROSS_SIZE") as pids:
        time.sleep(3)
        assert look_up(pids[2]) is not None
