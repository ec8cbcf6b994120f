"""A rank's time limits: in its first phase, at its end, with the interpreter's lock held, and behind a slower rank."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddk_ds.config import Limits
from ddk_ds.train import watchdog
from ddk_ds.train.watchdog import Watchdog

ROOT = Path(__file__).parents[3]
BEGIN = """
import ctypes, threading, time
from pathlib import Path
from ddk_ds.config import Limits
from ddk_ds.train import watchdog
watchdog._LEAD_S = 1.0
dog = watchdog.Watchdog(Limits(start_s={start_s}, step_s=1))

def wait_for_others():
    time.sleep(100)

"""


def ended(script: str, start_s: float = 1.0) -> tuple[int, str]:
    """Run a rank's script; its exit code and errors."""
    code = BEGIN.format(start_s=start_s) + script
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=90)
    return done.returncode, done.stderr


def test_it_limits_the_start() -> None:
    code, errors = ended("wait_for_others()")
    assert code == 1 and "start after step 0, at most 1 s: not done" in errors and "limits.start_s" in errors
    assert "Timeout (0:00:01)!" in errors and "in wait_for_others" in errors, errors


def test_it_limits_what_follows_the_end_of_the_main_thread(tmp_path: Path) -> None:
    script = f"""
dog.write_to(Path({str(tmp_path)!r}), 3)
dog.watch("end", 17)
threading.Thread(target=wait_for_others).start()
"""
    code, errors = ended(script, start_s=100)
    stacks = (tmp_path / "stacks/rank-3.txt").read_text()
    assert code == 1 and "end after step 17" in errors and "in wait_for_others" not in errors
    assert stacks.startswith("end after step 17, at most 1 s\nTimeout (0:00:01)!") and "in wait_for_others" in stacks


def test_it_ends_a_rank_whose_threads_cannot_run() -> None:
    """ctypes.PyDLL keeps the interpreter's lock, as loading a library does."""
    code, errors = ended("ctypes.PyDLL(None).sleep(100)")
    assert code == 1 and 'File "<string>"' in errors, errors


def test_a_rank_waits_as_long_as_a_slower_one_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has done its part of the checkpoint after 10 s; the other one may take an hour for its own."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(watchdog, "Thread", lambda **_: threadless())
    dog = Watchdog(Limits(checkpoint_s=3600, step_s=1800))
    dog.watch("step", 1)
    dog.watch("checkpoint", 1)
    now[0] += 10
    dog.watch("step", 1)
    assert dog._deadline == 1000 + 3600
    now[0] += 10
    dog.watch("step", 2)
    assert dog._deadline == 1020 + 1800


class threadless:
    def start(self) -> None:
        """Look at nothing."""


def test_only_rank_0_writes_at_each_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """512 ranks would truncate 512 files on a shared disk, step after step. Rank 0's says where the run is."""
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(watchdog, "Thread", lambda **_: threadless())
    writes, truncate = [], os.ftruncate
    monkeypatch.setattr(watchdog.os, "ftruncate", lambda *of: (writes.append(of), truncate(*of)))
    for rank, expected, step in ((0, 100, 99), (3, 1, 0)):
        dog = Watchdog(Limits())
        dog.write_to(tmp_path, rank)
        writes.clear()
        for number in range(100):
            dog.watch("step", number)
        text = (tmp_path / f"stacks/rank-{rank}.txt").read_text()
        assert (len(writes), text) == (expected, f"step after step {step}, at most 1800 s\n")
        dog.watch("checkpoint", 100)
        assert (tmp_path / f"stacks/rank-{rank}.txt").read_text() == "checkpoint after step 100, at most 3600 s\n"
        dog._report(b"", b"Timeout\n")  # the step of the stacks is the one that hangs
        assert (tmp_path / f"stacks/rank-{rank}.txt").read_text().endswith("step 100, at most 3600 s\nTimeout\n")


@pytest.mark.parametrize("limit", [0.0, 10.0, 100_000.0])
def test_a_collective_waits_longer_than_two_phases(limit: float) -> None:
    limits = Limits(evaluation_s=limit)
    assert limits.collective_s > 2 * max(limit, limits.checkpoint_s)
    assert limits.collective_s * 1000 < 2**31  # gloo's milliseconds
