"""A rank's reading processes: one set for all intervals, without anything of the rank. They end with it.

What several processes read is in order whatever their speed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from ddk_ds.commands import distill_rank
from ddk_ds.data.readers import Readers
from tests.unit.data.reading_rank import batches_of

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def rank() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.unit.data.reading_rank"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, text=True)
    yield process
    for left in (process, *living(process.pid)):
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            left.kill()
    process.wait()


@pytest.fixture(scope="module")
def seen(rank: subprocess.Popen[str]) -> dict[str, Any]:
    """What the rank saw before it began to wait for a sample that never comes."""
    assert rank.stdout is not None
    found: dict[str, Any] = json.loads(rank.stdout.readline())
    return found


def living(session: int) -> list[psutil.Process]:
    """The processes of a session that have not ended; nobody may wait for an orphan that has."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_one_set_of_processes_reads_every_interval_in_order(seen: dict[str, Any]) -> None:
    first, second, third = seen["pids"]
    assert first == second == third and len(set(first)) == 2
    expected = [
        [[ids, [i % 3 for i in ids], [[i] * 4 for i in ids]] for ids in batches_of(begin, 40)]
        for begin in (0, 100, 200)
    ]
    assert seen["read"] == [expected[0][:5], *expected[1:]]  # nothing of the interval that was left


def test_they_are_forked_from_a_server_without_the_ranks_sockets(
    rank: subprocess.Popen[str], seen: dict[str, Any]
) -> None:
    parents = {psutil.Process(pid).ppid() for pid in seen["pids"][0]}
    assert len(parents) == 1 and rank.pid not in parents
    server = psutil.Process(parents.pop())
    assert server.ppid() == rank.pid and "multiprocessing.forkserver" in " ".join(server.cmdline())
    assert seen["held"] == [[], []]


def test_signals_that_are_for_the_rank_do_not_end_them(seen: dict[str, Any]) -> None:
    assert seen["after signals"] == 3


def test_a_process_that_is_killed_is_an_error_and_one_that_waits_can_be_left(seen: dict[str, Any]) -> None:
    assert "reads samples for this rank (data.num_workers), was killed or has crashed, exit code -9" in seen["killed"]
    assert seen["given up"] == "a signal came while samples were read"
    assert seen["closed"] == [False, False]


def test_none_is_left_when_the_rank_is_killed(rank: subprocess.Popen[str], seen: dict[str, Any]) -> None:
    assert {process.pid for process in living(rank.pid)} > {rank.pid, *seen["pids"][0]}
    os.kill(rank.pid, signal.SIGKILL)
    rank.wait()
    end = time.monotonic() + 60
    while left := living(rank.pid):
        assert time.monotonic() < end, left
        time.sleep(0.02)


def test_they_are_started_before_the_ranks_meet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order: list[str] = []

    class Stop(Exception):
        pass

    def meet(*_: object) -> None:
        order.append("meet")
        raise Stop

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("ddk_ds.engine.runtime.start_runtime", meet)
    monkeypatch.setattr(distill_rank, "Watchdog", lambda limits: object())
    monkeypatch.setattr(Readers, "start", lambda self: order.append("start"))
    config: Any = type("Any", (), {"limits": None})
    with pytest.raises(Stop):
        distill_rank._run(config, Readers(0), 1, dry_run=False, preflight=False)
    assert order == ["start", "meet"]
