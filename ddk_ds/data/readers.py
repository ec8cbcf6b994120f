"""Processes that read samples ahead for a rank, one set for the whole run.

A rank must not fork: once NCCL and CUDA have started, some network providers abort at a fork (EFA), and a copy of the
rank would hold its connections. So the processes are forked by a server, an interpreter of its own that has imported
what they need, before the rank joins its process group. Each has its own pipe to the rank; there is no lock, semaphore
or shared memory that a kill could leave behind. They end with the rank, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import numpy as np

from ddk_ds.data.mds import Ids, Lengths, Packed, Targets
from ddk_ds.data.patience import never
from ddk_ds.errors import TemporaryError, UserError

_IMPORTED = ["__main__", "ddk_ds.data.loader", "streaming.base.format"]
# Micro-batches that a process may have ahead of the training: one waits in the pipe while it reads the next.
_AHEAD = 2
_LOOK_S = 0.2
_END_S = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class Samples(Protocol):
    """Source of the samples, which is sent to the processes once."""

    def read(self, sample_id: int) -> tuple[Packed, int]:
        """Return a sample, and the index of its domain. Raises UserError."""


class Read(NamedTuple):
    """A micro-batch as it is read. Tensors would go through shared memory, and be two to four times as large."""

    tokens: Ids
    """Token ids (B, L) in the shards' dtype."""
    domains: list[int]
    sample_ids: list[int]
    lengths: list[Lengths | None]
    """(B,) lengths of each sample's documents; None where they are not kept apart."""
    targets: list[Targets | None]
    """(B,) which tokens of each sample are targets; None where all are."""


class Readers:
    """The reading processes of a rank; with `number` 0 the rank reads by itself."""

    def __init__(self, number: int) -> None:
        """Start the server, which imports while this process does something else."""
        self._number = number
        self._context = multiprocessing.get_context("forkserver")
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._unread: list[int] = [0] * number
        self._samples: Samples | None = None
        self.give_up: Callable[[], bool] = never
        """Looked at while a micro-batch is waited for: True ends the wait by a TemporaryError."""
        if number:
            self._context.set_forkserver_preload(_IMPORTED)
            forkserver.ensure_running()

    def start(self) -> None:
        """Start the processes, as soon as the server has imported."""
        for number in range(self._number):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), name=f"reader-{number}")
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        wait_until = time.monotonic() + _END_S
        for process in self._processes:
            process.join(max(0.0, wait_until - time.monotonic()))
            process.kill()  # if it still waits for a store
            process.join()

    @property
    def pids(self) -> list[int]:
        """Return the ids of the processes."""
        return [process.pid for process in self._processes]

    def read(self, samples: Samples, batches: Sequence[list[int]]) -> Iterator[Read]:
        """Yield the micro-batches with these sample ids, in their order; the processes read in turn.

        What was read ahead of an earlier call, and not taken, is dropped.

        Raises:
            UserError: the samples' own; a TemporaryError if a process has died, or by `give_up`.
        """
        if not self._number:
            yield from (read_batch(samples, batch) for batch in batches)
            return
        self._drop_unread()
        if samples is not self._samples:
            for pipe in self._pipes:
                pipe.send(samples)
            self._samples = samples
        ahead = _AHEAD * self._number
        for number in range(-ahead, len(batches)):
            read = self._receive(number % self._number) if number >= 0 else None
            if number + ahead < len(batches):
                self._ask(number % self._number, batches[number + ahead])
            if read is not None:
                yield read

    def _drop_unread(self) -> None:
        for number, unread in enumerate(self._unread):
            for _ in range(unread):
                self._answer(number)

    def _ask(self, number: int, batch: list[int]) -> None:
        try:
            self._pipes[number].send(batch)
        except OSError:
            raise self._death(number) from None
        self._unread[number] += 1

    def _receive(self, number: int) -> Read:
        answer = self._answer(number)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _answer(self, number: int) -> Read | Exception:
        pipe = self._pipes[number]
        while not pipe.poll(_LOOK_S):
            if self.give_up():
                raise TemporaryError("a signal came while samples were read")
        try:
            answer: Read | Exception = pipe.recv()
        except (EOFError, OSError):
            raise self._death(number) from None
        self._unread[number] -= 1
        return answer

    def _death(self, number: int) -> TemporaryError:
        process = self._processes[number]
        process.join(_END_S)
        return TemporaryError(
            f"process {process.pid}, which reads samples for this rank (data.num_workers), was killed or has crashed, "
            f"exit code {process.exitcode}; the kernel's log says if memory ran out"
        )


def read_batch(samples: Samples, sample_ids: list[int]) -> Read:
    """Read the samples with these ids. Raises UserError, as `samples` does."""
    packed, domains = zip(*(samples.read(sample_id) for sample_id in sample_ids), strict=True)
    tokens, lengths, targets = zip(*packed, strict=True)
    return Read(np.stack(tokens), list(domains), sample_ids, list(lengths), list(targets))


def _serve(pipe: Connection) -> None:
    """Read what the rank asks for until it closes the pipe or ends. The signals that it hears are not for this process.

    The first message is the samples, each later one the ids of a micro-batch.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    rank = multiprocessing.parent_process()
    assert rank is not None
    threading.Thread(target=_end_with, args=(rank,), daemon=True).start()
    samples: Any = None
    try:
        while True:
            message = pipe.recv()
            if isinstance(message, list):
                pipe.send(_answer(samples, message))
            else:
                samples = message
    except (EOFError, OSError):
        return


def _answer(samples: Samples, sample_ids: list[int]) -> Read | Exception:
    try:
        return read_batch(samples, sample_ids)
    except UserError as error:
        return error
    except Exception:
        return RuntimeError(traceback.format_exc())


def _end_with(rank: Any) -> None:
    """End this process when the rank has ended, also while it waits for a store."""
    rank.join()
    os._exit(0)
