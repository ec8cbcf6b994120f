"""Memory of a run's devices and hosts by part (engine/memory_estimate.py), and the largest micro-batch. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddk_ds.config import Config
from ddk_ds.engine.memory_estimate import MEMORY_MARGIN, MemoryEstimate, estimate_memory, settled_place
from ddk_ds.planner.gpus import Cluster
from ddk_ds.planner.plan_inputs import Models

_MASTER_BYTES, _MOMENTS_BYTES = 4, 8
"""Bytes a parameter of the float32 master weight and of AdamW's two moments."""
_LARGEST_TRIED = 1 << 16
_PLAN_NAMES = {
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
"""Names of parts in a plan, by the estimate's; other parts have the same name in both."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that each device and each host holds."""

    device_parts: dict[str, int]
    """Bytes of each part on one device. Those of a pass, of the update and of loading are never held together."""
    host_parts: dict[str, int]
    """Bytes of each part on the host, for one device."""
    device_bytes: int
    """Peak of one device."""
    host_bytes: int
    """Peak of one node's host, for all its devices."""
    usable_bytes: int
    """Bytes of a device that may be planned with: MEMORY_MARGIN of its memory."""
    fits: bool
    """True if a device can hold the configured micro-batch."""
    activations: dict[str, int]
    """Bytes of the configured micro-batch's activations, with and without gradient checkpointing."""
    max_micro_batch: int
    """Samples of the largest micro-batch that fits; 0 if none fits."""
    max_dividing: int
    """Samples of the largest micro-batch that fits and divides a rank's samples of a step; 0 if none does."""


def plan_memory(config: Config, models: Models, cluster: Cluster) -> MemoryPlan:
    """Estimate the memory of a run on that cluster."""
    total = estimate(config, models, cluster)

    def activations(checkpointing: bool | str) -> int:
        other = changed(config, student={"gradient_checkpointing": checkpointing})
        return estimate(other, models, cluster).passes["activations"]

    largest = _largest(lambda samples: fits(with_micro_batch(config, samples), models, cluster))
    per_rank, remainder = divmod(config.train.global_batch_samples * config.train.sequence_parallel, cluster.ranks)
    dividing = [n for n in range(1, min(largest, per_rank) + 1) if per_rank % n == 0 and not remainder]
    return MemoryPlan(
        device_parts=_plan_parts({**total.resident, **total.passes, **total.update, **total.loading}),
        host_parts=_plan_parts(total.host),
        device_bytes=total.device_bytes,
        host_bytes=total.host_bytes * cluster.gpus_per_node,
        usable_bytes=_usable_bytes(cluster),
        fits=holds(cluster, total.device_bytes),
        activations={
            "with checkpointing": activations(True),
            "with selective checkpointing": activations("selective"),
            "without checkpointing": activations(False),
        },
        max_micro_batch=largest,
        max_dividing=max(dividing, default=0),
    )


def placed(config: Config, models: Models, cluster: Cluster) -> Config:
    """Return the configuration with the place that a run on the cluster takes for `teacher.shard_within: auto`."""
    return settled_place(config, lambda tried: fits(tried, models, cluster))


def fits(config: Config, models: Models, cluster: Cluster) -> bool:
    """Return True if a device of the cluster can hold the run."""
    return holds(cluster, estimate(config, models, cluster).device_bytes)


def holds(cluster: Cluster, device_bytes: int) -> bool:
    """Return True if a device of the cluster can hold so many bytes."""
    return device_bytes <= _usable_bytes(cluster)


def _usable_bytes(cluster: Cluster) -> int:
    return int(MEMORY_MARGIN * cluster.gpu.memory_bytes)


def estimate(config: Config, models: Models, cluster: Cluster) -> MemoryEstimate:
    """Return `engine.memory_estimate`'s estimate of one GPU of the cluster."""
    shapes = models.student.shape, None if models.teacher is None else models.teacher.shape
    return estimate_memory(config, *shapes, models.vocab_size, cluster.ranks, ranks_per_node=cluster.gpus_per_node)


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """Return a copy of the configuration with other values: changed(config, train={"micro_batch_samples": 2})."""
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def with_micro_batch(config: Config, samples: int) -> Config:
    """Return the configuration with a micro-batch of that many samples."""
    return changed(config, train={"micro_batch_samples": samples})


def _plan_parts(parts: dict[str, int]) -> dict[str, int]:
    """Rename the estimate's parts (bytes by name), split master weights from moments, and leave out empty parts."""
    renamed: dict[str, int] = {}
    for name, num_bytes in parts.items():
        if name == "master weights and moments":
            master = num_bytes * _MASTER_BYTES // (_MASTER_BYTES + _MOMENTS_BYTES)
            renamed["student shards: float32 master"] = master
            renamed["student shards: moments"] = num_bytes - master
        elif num_bytes:
            renamed[_PLAN_NAMES.get(name, name)] = num_bytes
    return renamed


def _largest(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits, or 0, by bisection: every number below one that fits must fit too."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < _LARGEST_TRIED and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
