"""Communication between ranks: the only importer of torch.distributed, and a substitute for a single process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from threading import Event, Thread
from typing import Any, NoReturn, Protocol, TypeVar

import torch
import torch.distributed as dist

from ddk_ds.errors import TemporaryError, UserError

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
        """Return the process group of this rank within `scope`: "node", "gpu" (this rank alone) or "world" (None)."""

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
        if scope == "world":
            return None
        return self._node_group if scope == "node" else dist.new_group([self.rank], use_local_synchronization=True)

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


_LEAVING, _HEARD = "ddk_ds/leaving", "ddk_ds/heard"
_LOOK_EVERY_S, _LONGEST_WAIT_S = 0.5, 5.0
_ended = Event()
_listeners: list[Thread] = []


def hear_leaving() -> None:
    """End this process as soon as another rank has called `leave`, with that rank's code. A thread looks for it.

    This rank may be in a collective that the other one will not join: it could not learn it otherwise, and would end by
    a lost connection or a time limit.
    """
    store = _store().clone()  # a separate connection, because the other one may be blocked

    def look() -> None:
        try:
            while not store.check([_LEAVING]):
                if _ended.wait(_LOOK_EVERY_S):
                    return
            code = int(store.get(_LEAVING).split()[0])
            _has_heard(store)
        except (RuntimeError, OSError):  # the process that keeps the store has gone
            return
        os._exit(code)

    _listeners.append(Thread(target=look, name="leaving", daemon=True))
    _listeners[-1].start()


def leave(code: int, say: Callable[[], object]) -> NoReturn:
    """End this process, which cannot go on, and all other ranks, with the code of the first rank that leaves.

    That rank calls `say`, so that an error that all ranks have agreed on is said once. The process group is not left in
    an orderly way: that could wait for ranks that are gone.
    """
    said = False
    try:
        _stop_hearing()  # this rank's own thread would take this for another rank's
        store, rank = _store(), dist.get_rank()
        first_code, first_rank = map(int, store.compare_set(_LEAVING, "", f"{code} {rank}").split())
        code, said = first_code, True
        if first_rank == rank:
            say()
        _has_heard(store)
    except (RuntimeError, OSError):  # the process that keeps the store has gone
        if not said:
            say()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


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
