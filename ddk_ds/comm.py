"""Communication between ranks: the only importer of torch.distributed, and a substitute for a single process."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from threading import Event, Thread
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import torch
import torch.distributed as dist

from ddk_ds.errors import TemporaryError, UserError
from ddk_ds.ties import accept_ties, tie_to_rank_0

T = TypeVar("T")


class Comm(Protocol):
    """Communication between ranks. Every method is collective: all ranks call it, in the same order."""

    rank: int
    world_size: int
    local_rank: int

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks in place, and return it."""

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` in place by its elementwise maximum over all ranks, and return it."""

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in the order of ranks, on every rank."""

    def broadcast_in_node(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` with the one of the first rank of this node."""

    def group_within(self, scope: str) -> Any:
        """Return the process group of this rank within `scope`: "node" or "world" (None)."""

    def group_of(self, size: int) -> Any:
        """Make groups of `size` consecutive ranks and return the process group of this rank's. Collective."""

    def barrier(self) -> None:
        """Wait until every rank has called this."""


class SingleProcess:
    """Communication of a single process, in which every collective returns its input."""

    rank = 0
    world_size = 1
    local_rank = 0

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def broadcast_in_node(self, tensor: torch.Tensor) -> None:
        return None

    def group_within(self, scope: str) -> Any:
        return None

    def group_of(self, size: int) -> Any:
        return None

    def barrier(self) -> None:
        return None


class ProcessGroup:
    """Communication within torch's default process group, which must have been initialised."""

    def __init__(self, local_rank: int) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.local_rank = local_rank
        # The ranks of a node have consecutive numbers, and each node begins with local rank 0.
        firsts = [rank for rank, local in enumerate(self.gather_objects(local_rank)) if local == 0]
        for first, end in zip(firsts, [*firsts[1:], self.world_size], strict=True):
            group = dist.new_group(list(range(first, end)))
            if first <= self.rank < end:
                self._node_first = first
                self._node_group: Any = group

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_in_node(self, tensor: torch.Tensor) -> None:
        dist.broadcast(tensor, src=self._node_first, group=self._node_group)

    def group_within(self, scope: str) -> Any:
        return None if scope == "world" else self._node_group

    def group_of(self, size: int) -> Any:
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, self.world_size, size)]
        return groups[self.rank // size]

    def barrier(self) -> None:
        dist.barrier()


def collectives(comm: Comm, device: torch.device, num_bytes: int) -> dict[str, Callable[[], Any]]:
    """Return by name a function for each kind of collective that a run uses; all ranks call them in the same order.

    `num_bytes` is about the size of the tensors that are moved. For sharded tensors it is the size of all slices
    together.
    """
    full = torch.zeros(comm.world_size * -(-num_bytes // (4 * comm.world_size)), device=device)
    slice_ = torch.zeros(len(full) // comm.world_size, device=device)
    return {
        "barrier": comm.barrier,
        "broadcast_object": lambda: comm.broadcast_object(comm.rank),
        "gather_objects": lambda: comm.gather_objects(comm.rank),
        "all_reduce sum": lambda: comm.all_reduce_sum(full),
        "all_reduce max": lambda: comm.all_reduce_max(full),
        "broadcast in node": lambda: comm.broadcast_in_node(full),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(full, slice_),  # gathers ZeRO-3's weights
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(slice_, full),  # reduces its gradients
    }


def announce(place: str) -> None:
    """Record for `missing_ranks` that this rank has reached `place`. Does not wait for other ranks."""
    if dist.is_initialized():
        _store().set(f"ddk_ds/{place}/{dist.get_rank()}", "")


def missing_ranks(place: str) -> list[int]:
    """Return the ranks that have not reached `place` yet.

    Does not wait for other ranks, so that a thread can call it while a collective hangs.
    """
    if not dist.is_initialized():
        return []
    store = _store().clone()  # a separate connection, because the other one may be blocked
    return [rank for rank in range(dist.get_world_size()) if not store.check([f"ddk_ds/{place}/{rank}"])]


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def set_default_timeout(seconds: float) -> timedelta:
    """Make `seconds` the timeout of every process group that is made later without one, DeepSpeed's too; return it."""
    timeout = timedelta(seconds=seconds)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(dist.distributed_c10d, name, timeout)
    return timeout


_LEAVING, _HEARD, _TIES = "ddk_ds/leaving", "ddk_ds/heard", "ddk_ds/ties"
_LOOK_EVERY_S, _LONGEST_WAIT_S = 0.5, 5.0
# A collective fails as soon as a rank is gone: the ties then get the time to say which one, before that error counts.
_BROKEN_TIE_S, _UNEXPECTED_ERROR_S = 1.0, 2.5
_ended = Event()
_listeners: list[Thread] = []


class _Leaver(NamedTuple):
    """The first rank that left, as the store has it; `said` is what the other hosts print of it."""

    code: int
    rank: int
    said: str


def watch_ranks(silence_s: float) -> None:
    """End this process as soon as another rank has called `leave`, with that rank's code, or is gone. Collective.

    Two threads look for it. This rank may be in a collective that the other one will not join: it could not learn it
    otherwise, and would end by a lost connection or a time limit. One rank of each host prints which rank it was.

    Args:
        silence_s: seconds after which a host that does not answer counts as gone; 0: for ever.
    """
    store = _store().clone()  # a separate connection, because the other one may be blocked
    if dist.get_world_size() > 1:
        _tie_ranks(store, silence_s)

    def look() -> None:
        try:
            while not store.check([_LEAVING]):
                if _ended.wait(_LOOK_EVERY_S):
                    return
            leaver = _leaver(store.get(_LEAVING))
            _tell(leaver.said)
            _has_heard(store)
        except (RuntimeError, OSError):  # the process that keeps the store has gone
            return
        os._exit(leaver.code)

    _listeners.append(Thread(target=look, name="leaving", daemon=True))
    _listeners[-1].start()


def _tie_ranks(store: Any, silence_s: float) -> None:
    address, rank = os.environ["MASTER_ADDR"], dist.get_rank()

    def lost(other: int, host: str, silent: bool) -> None:
        if _ended.wait(_BROKEN_TIE_S):
            return  # the end of the run; if the other rank has called `leave`, this process ends in this time
        said = (
            f"host {host} (rank {other}) has not answered for {silence_s:g} s: it or its network is down; the run ends"
            if silent
            else f"rank {other} on {host} is gone without a word: killed, or crashed; the run ends"
        )
        if rank == 0:
            _first_to_leave(store, _Leaver(1, other, said))
        else:  # the store was in rank 0's process
            _tell(said)
            os._exit(1)

    if rank == 0:
        store.set(_TIES, accept_ties(address, silence_s, lost))
        return
    try:
        tie_to_rank_0(address, store.get(_TIES).decode(), rank, silence_s, lost)
    except OSError as error:
        _tell(
            f"warning: rank {rank} on {socket.gethostname()} cannot be tied to rank 0 at {address} ({error}): if a "
            "host dies, only the time limits end the run; let the hosts reach each other on all ports"
        )


def leave(code: int, say: Callable[[], object]) -> NoReturn:
    """End this process, which cannot go on, and all other ranks, with the code of the first rank that leaves.

    That rank calls `say`, so that an error that all ranks have agreed on is said once. The process group is not left in
    an orderly way: that could wait for ranks that are gone. If the store does not answer, this rank ends by itself.
    """
    try:
        if code == 1:  # an unexpected error; if it came of a rank that is gone, this process is ended in this time
            _ended.wait(_UNEXPECTED_ERROR_S)
        _stop_hearing()  # this rank's own thread would take this for another rank's
        first = _within(_LONGEST_WAIT_S, lambda: _first_to_leave(_store(), _this_rank(code))) if in_group() else None
        if first is None or first.rank == dist.get_rank():
            say()
        elif first.code == 1:
            _tell(first.said)
        if first is not None:
            code = first.code
            _within(2 * _LONGEST_WAIT_S, lambda: _has_heard(_store()))
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _this_rank(code: int) -> _Leaver:
    rank = dist.get_rank()
    return _Leaver(code, rank, f"rank {rank} on {socket.gethostname()} ended the run with exit code {code}")


def _first_to_leave(store: Any, this: _Leaver) -> _Leaver:
    """Note `this` in the store, unless another one stands there, and return the one that stands there."""
    return _leaver(store.compare_set(_LEAVING, "", json.dumps(this)))


def _leaver(noted: bytes) -> _Leaver:
    return _Leaver(*json.loads(noted))


def _within(seconds: float, ask: Callable[[], T]) -> T | None:
    """Return `ask()`, or None if it fails or takes longer: the host with the store may be down."""
    answers: list[T] = []

    def work() -> None:
        with suppress(RuntimeError, OSError):
            answers.append(ask())

    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def _tell(line: str) -> None:
    """Print `line` on one rank of each host."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def _has_heard(store: Any) -> None:
    """Note that this rank has heard it. Rank 0, which keeps the store, then waits for 5 s at most for the others."""
    heard, end = store.add(_HEARD, 1), time.monotonic() + _LONGEST_WAIT_S
    while dist.get_rank() == 0 and heard < dist.get_world_size() and time.monotonic() < end:
        time.sleep(_LOOK_EVERY_S / 10)
        heard = store.add(_HEARD, 0)


def _stop_hearing() -> None:
    _ended.set()
    for listener in _listeners:
        listener.join(_LONGEST_WAIT_S)


def in_group() -> bool:
    """Return True if this process is in a process group."""
    return dist.is_initialized()


def destroy() -> None:
    """Leave the process group if this process is in one. Collective: all ranks have come to their end."""
    if dist.is_initialized():
        dist.barrier()  # until then a rank that fails is heard of
        _stop_hearing()
        dist.barrier()  # the store is in the first rank's process: nobody may ask it any more when that ends
        dist.destroy_process_group()


def raise_together(comm: Comm, error: UserError | None) -> None:
    """Raise on every rank the `error` of the lowest rank that has one, so that no rank waits for one that left.

    A TemporaryError counts only if no rank has an error that time does not mend. Returns on every rank if `error` is
    None on all of them. Collective.
    """
    errors = [rank_error for rank_error in comm.gather_objects(error) if rank_error is not None]
    if errors:
        raise min(errors, key=lambda rank_error: isinstance(rank_error, TemporaryError))


def call_together(comm: Comm, function: Callable[[], T]) -> T:
    """Return `function()` on every rank; if it raised a UserError on any rank, raise that on every rank. Collective.

    `function` must not call collectives itself.
    """
    try:
        value = function()
    except UserError as error:
        raise_together(comm, error)
        raise
    raise_together(comm, None)
    return value
