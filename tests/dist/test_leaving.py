"""A rank that cannot go on, or is gone, ends the others, which wait for it: one code, and the rank's name and host."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ddk_ds import ties
from ddk_ds.comm import destroy, leave, watch_ranks
from ddk_ds.launcher import free_port
from tests.dist.ranks import SERVER
from tools.bench.forked import rank_environment

SILENCE_S = 2.0
LONG_S = 3 * SILENCE_S
SAME = pytest.mark.long("another rank by the same way out")


def rank_process(rank: int, port: int, does: Sequence[str], folder: Path, backend: str) -> None:
    """A rank on a host of its own, which does one of the things below after all have met."""
    with (folder / f"rank{rank}.txt").open("w", buffering=1) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(rank_environment(rank, len(does), port, per_node=1))
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend)
    watch_ranks(SILENCE_S)
    if set(does) - {"ends", "is slow", "is stopped"}:
        dist.destroy_process_group = lambda: time.sleep(600)  # as under NCCL, which waits for ranks that are gone
    try:
        dist.barrier()
        what = does[rank]
        if what.isdecimal():
            leave(int(what), lambda: print(f"rank {rank}: why", flush=True))
        elif what in ("raises", "raises at the end"):
            time.sleep(2.0 if what == "raises at the end" else 0.0)
            raise ValueError("planted")
        elif what == "waits":
            dist.barrier()
        elif what == "loads":
            time.sleep(600)
        elif what == "is slow":
            ctypes.PyDLL(None).usleep(int(LONG_S * 1e6))  # it holds the interpreter's lock
        elif what in ("is killed", "is stopped"):
            os.kill(os.getpid(), signal.SIGKILL if what == "is killed" else signal.SIGSTOP)
        destroy()
    except (RuntimeError, ValueError):  # gloo may notice a lost connection before the ties do
        leave(1, traceback.print_exc)


@contextmanager
def ranks(does: Sequence[str], folder: Path, backend: str = "gloo") -> Iterator[list[BaseProcess]]:
    """Ranks that do these things; what is left of them is killed."""
    port = free_port()
    arguments = [(rank, port, does, folder, backend) for rank in range(len(does))]
    started = [SERVER.Process(target=rank_process, args=each) for each in arguments]
    for process in started:
        process.start()
    try:
        yield started
    finally:
        for process in started:
            process.kill()


def outputs(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("rank*.txt"))]


def ends(does: Sequence[str], folder: Path, backend: str = "gloo") -> tuple[int | None, ...]:
    """The exit codes of ranks that do these things."""
    with ranks(does, folder, backend) as started:
        end = time.monotonic() + 120
        for process in started:
            process.join(max(0.0, end - time.monotonic()))
        return tuple(process.exitcode for process in started)


@pytest.mark.parametrize(
    ("does", "codes"),
    [
        (("2", "waits", "waits"), (2, 2, 2)),
        (("waits", "loads", "69"), (69, 69, 69)),
        (("1", "1", "1"), (1, 1, 1)),
        (("ends", "ends", "ends"), (0, 0, 0)),
    ],
)
def test_all_ranks_end_with_one_code(tmp_path: Path, does: Sequence[str], codes: Sequence[int]) -> None:
    assert ends(does, tmp_path) == codes, outputs(tmp_path)
    text = "".join(outputs(tmp_path))
    assert sum(line.endswith(": why") for line in text.splitlines()) == (codes[0] != 0), text
    assert "Traceback" not in text and "recvValue failed" not in text, text


@pytest.mark.parametrize(
    ("does", "culprit", "code", "said"),
    [
        (("raises", "waits", "loads"), 0, 1, "ended the run with exit code 1"),
        pytest.param(("waits", "loads", "raises"), 2, 1, "ended the run with exit code 1", marks=SAME),
        (("raises at the end", "ends", "ends"), 0, 1, "ended the run with exit code 1"),
        (("waits", "is killed", "loads"), 1, -9, "is gone without a word: killed, or crashed"),
        pytest.param(("is killed", "waits", "loads"), 0, -9, "is gone without a word: killed, or crashed", marks=SAME),
    ],
)
def test_the_others_name_the_rank_that_failed(
    tmp_path: Path, does: Sequence[str], culprit: int, code: int, said: str
) -> None:
    codes = [1, 1, 1]
    codes[culprit] = code
    assert list(ends(does, tmp_path)) == codes, outputs(tmp_path)
    texts = outputs(tmp_path)
    assert ("ValueError: planted" in texts[culprit]) == (code == 1), texts
    for rank, text in enumerate(texts):
        assert rank == culprit or f"rank {culprit} on {socket.gethostname()} {said}" in text, texts
        assert rank == culprit or "Traceback" not in text, texts


@pytest.mark.long("it waits for the store's limit, 10 s")
def test_a_rank_leaves_though_the_store_does_not_answer(tmp_path: Path) -> None:
    """The store is in rank 0's process, whose host may be down."""
    with ranks(("is stopped", "raises"), tmp_path) as started:
        started[1].join(120)
        assert started[1].exitcode == 1, outputs(tmp_path)
    assert "ValueError: planted" in outputs(tmp_path)[1]


def test_a_slow_and_a_stopped_process_are_not_gone(tmp_path: Path) -> None:
    with ranks(("is slow", "ends", "is stopped"), tmp_path) as started:
        while "(stopped)" not in Path(f"/proc/{started[2].pid}/status").read_text():
            assert started[2].exitcode is None, outputs(tmp_path)
            time.sleep(0.05)
        time.sleep(LONG_S)
        assert started[2].pid is not None
        os.kill(started[2].pid, signal.SIGCONT)
        for process in started:
            process.join(60)
        assert [process.exitcode for process in started] == [0, 0, 0], outputs(tmp_path)


def test_who_does_not_know_the_token_is_no_rank() -> None:
    lost: list[tuple[int, str, bool]] = []
    accepted = ties.accept_ties("127.0.0.1", 45.0, lambda *what: lost.append(what))
    port = int(accepted.split()[0])
    stranger = socket.create_connection(("127.0.0.1", port))
    stranger.sendall(b"guess 1 host")
    assert stranger.recv(1) == b""
    rank = socket.create_connection(("127.0.0.1", port))
    rank.sendall(f"{accepted.split()[1]} 7 node3".encode())
    time.sleep(0.5)
    rank.close()
    end = time.monotonic() + 30
    while not lost:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert lost == [(7, "node3", False)]


def test_a_kernel_breaks_a_tie_within_the_time_of_silence() -> None:
    with socket.socket() as tie:
        ties._probe(tie, 45.0)
        idle, every = (tie.getsockopt(socket.IPPROTO_TCP, name) for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL))
        assert tie.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        # Linux breaks it at the first probe after this time; unacknowledged data has the same limit.
        assert tie.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 45_000
        assert idle + every < 45 and 45 + every <= 60
