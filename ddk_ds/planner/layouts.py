"""Where the teacher's weights lie, over the size of a cluster and the speed of its network. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ddk_ds.config import Config
from ddk_ds.engine.memory import fewest_passes
from ddk_ds.errors import ConfigError
from ddk_ds.planner.gpus import Cluster
from ddk_ds.planner.memory import Models, changed, plan_memory
from ddk_ds.planner.scaling import MOST_GPUS, batch_for_most, with_batch
from ddk_ds.planner.step import simulate_step

LINKS_BYTES_PER_S = (3e9, 25e9, 100e9)
# `teacher.shard_within`, and whether a pass takes as many micro-batches as memory holds. Within a GPU nothing is
# gathered.
LAYOUTS = (("world", False), ("world", True), ("node", False), ("node", True), ("gpu", False))
# Speeds that differ by less are equal: the model is no better than that.
_EQUAL = 0.01


@dataclass(frozen=True)
class LayoutPoint:
    """One layout on one cluster."""

    link_bytes_per_s: float
    """Of the network, for each GPU."""
    gpus: int
    shard_within: str
    micro_batches_per_pass: int
    tokens_per_s_per_gpu: float
    device_bytes: int
    fits: bool
    several: bool
    """Whether more than one micro-batch a pass was looked for."""

    @property
    def name(self) -> str:
        """As it is set."""
        return f"{self.shard_within}, n a pass" if self.several else self.shard_within


def layouts(
    config: Config, models: Models, cluster: Cluster, *, domains: int, storage_bytes_per_s: float
) -> list[LayoutPoint]:
    """Every layout on 1, 2, 4, ... nodes of `cluster`'s, up to 1,024 GPUs, by networks of three speeds.

    The batch is the configured one, doubled until 1,024 GPUs have a sample each. Raises ConfigError where there is no
    teacher.
    """
    if config.teacher is None or models.teacher is None:
        raise ConfigError(f"--layouts: method {config.method} has no teacher whose weights could lie anywhere")
    samples = batch_for_most(config)

    def point(at: Cluster, within: str, several: bool) -> LayoutPoint:
        placed = changed(
            with_batch(config, samples, at.ranks), teacher={"shard_within": within, "micro_batches_per_pass": 1}
        )
        most = placed.micro_batches(at.ranks) if several else 1
        chosen = fewest_passes(placed, most, lambda tried: plan_memory(tried, models, at).fits)
        step = simulate_step(chosen, models, at, domains=domains, storage_bytes_per_s=storage_bytes_per_s)
        memory = plan_memory(chosen, models, at)
        return LayoutPoint(
            link_bytes_per_s=at.gpu.network_bytes_per_s,
            gpus=at.ranks,
            shard_within=within,
            micro_batches_per_pass=chosen.per_pass,
            tokens_per_s_per_gpu=step.tokens_per_s / at.ranks,
            device_bytes=memory.device_bytes,
            fits=memory.fits,
            several=several,
        )

    found = []
    for link in LINKS_BYTES_PER_S:
        gpu = cluster.gpu.model_copy(update={"network_bytes_per_s": link})
        nodes = 1
        while nodes * cluster.gpus_per_node <= MOST_GPUS:
            at = replace(cluster, gpu=gpu, nodes=nodes)
            found += [point(at, within, several) for within, several in LAYOUTS]
            nodes *= 2
    return found


def advised(points: Sequence[LayoutPoint]) -> LayoutPoint | None:
    """Of one cluster's layouts the fastest that fits; of those that are as fast, the one of the least memory."""
    fitting = [point for point in points if point.fits]
    best = max((point.tokens_per_s_per_gpu for point in fitting), default=0.0)
    equal = [point for point in fitting if point.tokens_per_s_per_gpu >= (1 - _EQUAL) * best]
    return min(equal, key=lambda point: point.device_bytes, default=None)
