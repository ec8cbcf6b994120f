"""The only importer of torch.distributed: what the run asks of its ranks, and a stand-in for a single process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from ddk_ds.errors import UserError

T = TypeVar("T")


class Comm(Protocol):
    """What every part that talks across ranks relies on. Every call is collective: all ranks make it, in one order."""

    rank: int
    world_size: int
    local_rank: int

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; returns the tensor."""

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Maximum over ranks, in place; returns the tensor."""

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value on every rank."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""

    def broadcast_in_node(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` with that of the node's first rank."""

    def group_within(self, place: str) -> Any:
        """The process group of this rank's `place`: node, or gpu (this rank alone); None for the world."""

    def barrier(self) -> None:
        """Wait for every rank."""


class SingleProcess:
    """One process alone: every collective is the identity."""

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

    def group_within(self, place: str) -> Any:
        return None

    def barrier(self) -> None:
        return None


class ProcessGroup:
    """The default process group, which must have been initialised."""

    def __init__(self, local_rank: int) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.local_rank = local_rank
        # Ranks of a node are neighbours, and a node begins where a local rank is 0.
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

    def group_within(self, place: str) -> Any:
        if place == "world":
            return None
        return self._node_group if place == "node" else dist.new_group([self.rank], use_local_synchronization=True)

    def barrier(self) -> None:
        dist.barrier()


def collectives(comm: Comm, device: torch.device, num_bytes: int) -> dict[str, Callable[[], Any]]:
    """Every kind of collective that a run uses, by name, each ready to be called by all ranks in one order.

    Those of tensors move about `num_bytes` bytes: the whole tensor, of which a rank has one slice where it is sharded.
    """
    whole = torch.zeros(comm.world_size * -(-num_bytes // (4 * comm.world_size)), device=device)
    slice_ = torch.zeros(len(whole) // comm.world_size, device=device)
    return {
        "barrier": comm.barrier,
        "broadcast_object": lambda: comm.broadcast_object(comm.rank),
        "gather_objects": lambda: comm.gather_objects(comm.rank),
        "all_reduce sum": lambda: comm.all_reduce_sum(whole),
        "all_reduce max": lambda: comm.all_reduce_max(whole),
        "broadcast in node": lambda: comm.broadcast_in_node(whole),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(whole, slice_),  # ZeRO-3 gathers weights
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(slice_, whole),  # and scatters gradients
    }


def announce(place: str) -> None:
    """Note, for `absent`, that this rank came to `place`. Waits for no other rank."""
    if dist.is_initialized():
        _store().set(f"ddk_ds/{place}/{dist.get_rank()}", "")


def absent(place: str) -> list[int]:
    """The ranks that have not come to `place` so far. Waits for none, so a thread may ask while a collective hangs."""
    if not dist.is_initialized():
        return []
    store = _store().clone()  # a connection of its own: the other may be waiting
    return [rank for rank in range(dist.get_world_size()) if not store.check([f"ddk_ds/{place}/{rank}"])]


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def destroy() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def agree(comm: Comm, error: UserError | None) -> None:
    """Raise on every rank if any rank holds an error (the lowest rank's), so that none waits for one that left."""
    for found in comm.gather_objects(error):
        if found is not None:
            raise found


def agreed(comm: Comm, check: Callable[[], T]) -> T:
    """`check()` on every rank, or, if it raised a UserError on any, that error on every rank. Collective.

    `check` must make no collective call of its own.
    """
    try:
        value = check()
    except UserError as error:
        agree(comm, error)
        raise
    agree(comm, None)
    return value
