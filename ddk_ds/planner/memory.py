"""Whether a run fits its devices: the estimate of `engine.memory` by parts, and the largest micro-batch. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddk_ds.config import Config
from ddk_ds.engine.memory import MEMORY_MARGIN, MemoryEstimate, estimate_memory
from ddk_ds.planner.gpus import Cluster
from ddk_ds.planner.models import PlannedModel

# float32 master weight, and AdamW's two moments, of the estimate's "master weights and moments".
_MASTER, _MOMENTS = 4, 8
_LARGEST_TRIED = 1 << 16


@dataclass(frozen=True)
class Models:
    """The two models of a plan, and the tokens that the loss knows."""

    student: PlannedModel
    teacher: PlannedModel | None
    vocab_size: int


@dataclass(frozen=True)
class MemoryPlan:
    """What each device and host holds, in bytes."""

    device_parts: dict[str, int]
    """Of one device. Those of the update and those of a pass are never there together."""
    host_parts: dict[str, int]
    """Of the host, for one device."""
    device_bytes: int
    """Most that a device holds at a time."""
    host_bytes: int
    """Most that a node's host holds at a time, for all its devices."""
    usable_bytes: int
    """Of the device: MEMORY_MARGIN of its memory."""
    activations: dict[str, int]
    """Of the configured micro-batch, with and without gradient checkpointing."""
    max_micro_batch: int
    """Samples of the largest micro-batch that fits; 0 where none does."""
    max_dividing: int
    """Of those that divide a rank's samples of a step, the largest that fits; 0 where none does."""

    @property
    def fits(self) -> bool:
        """Whether the configured micro-batch fits."""
        return self.device_bytes <= self.usable_bytes


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with other values: changed(config, train={"micro_batch_samples": 2})."""
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def with_micro_batch(config: Config, samples: int) -> Config:
    """The configuration with another micro-batch."""
    return changed(config, train={"micro_batch_samples": samples})


def estimate(config: Config, models: Models, cluster: Cluster) -> MemoryEstimate:
    """`engine.memory`'s estimate of one GPU of the cluster."""
    shapes = models.student.shape, None if models.teacher is None else models.teacher.shape
    return estimate_memory(config, *shapes, models.vocab_size, cluster.ranks, ranks_per_node=cluster.gpus_per_node)


def plan_memory(config: Config, models: Models, cluster: Cluster) -> MemoryPlan:
    """The memory of a run on that cluster."""
    whole = estimate(config, models, cluster)
    usable = int(MEMORY_MARGIN * cluster.gpu.memory_bytes)

    def fits(samples: int) -> bool:
        return estimate(with_micro_batch(config, samples), models, cluster).device_bytes <= usable

    largest = _largest(fits)
    per_rank, rest = divmod(config.train.global_batch_samples, cluster.ranks)
    dividing = [n for n in range(1, min(largest, per_rank) + 1) if per_rank % n == 0 and not rest]
    return MemoryPlan(
        device_parts=_named({**whole.resident, **whole.passes, **whole.update}),
        host_parts=_named(whole.host),
        device_bytes=whole.device_bytes,
        host_bytes=whole.host_bytes * cluster.gpus_per_node,
        usable_bytes=usable,
        activations={
            name: estimate(changed(config, student={"gradient_checkpointing": on}), models, cluster).passes[
                "activations"
            ]
            for name, on in (
                ("with checkpointing", True),
                ("with selective checkpointing", "selective"),
                ("without checkpointing", False),
            )
        },
        max_micro_batch=largest,
        max_dividing=max(dividing, default=0),
    )


def _named(parts: dict[str, int]) -> dict[str, int]:
    """The estimate's parts in the plan's names: a student's states one by one, and nothing that is empty."""
    named: dict[str, int] = {}
    for name, taken in parts.items():
        if name == "master weights and moments":
            named["student shards: float32 master"] = taken * _MASTER // (_MASTER + _MOMENTS)
            named["student shards: moments"] = taken - named["student shards: float32 master"]
        elif taken:
            named[_NAMES.get(name, name)] = taken
    return named


_NAMES = {
    "student shards": "student shards: parameters",
    "gradient sums": "student shards: gradient accumulation",
    "student gathered": "gathered: student's layers and head",
    "teacher gathered": "gathered: teacher's layers or head",
    "logits of a chunk": "logits chunk: logits of both models",
    "logits' gradients": "logits chunk: gradients",
    "gradient bucket": "buckets: gradient bucket",
    "gradients joined for the reduction": "buckets: gradients joined for the reduction",
    "checkpoint's copy": "checkpoint copy on the host",
}


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number for which `fits` is true, which is so up to it and not beyond; 0 where it never is."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < _LARGEST_TRIED and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
