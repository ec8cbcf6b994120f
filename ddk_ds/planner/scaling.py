"""Strong and weak scaling of the simulated step, on up to 1,024 GPUs. Pure.

Where the teacher's weights lie, over the size of a cluster and the speed of its network. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ddk_ds.config import Config
from ddk_ds.engine.memory_estimate import fewest_passes
from ddk_ds.errors import ConfigError
from ddk_ds.planner.gpu_memory import Models, changed, plan_memory
from ddk_ds.planner.gpus import Cluster
from ddk_ds.planner.step_time import simulate_step

MOST_GPUS = 1024


@dataclass(frozen=True)
class ScalingPoint:
    """One number of GPUs."""

    gpus: int
    global_batch_samples: int
    micro_batch_samples: int
    step_s: float
    tokens_per_s: float
    mfu: float
    fits: bool
    """Whether the memory of a device holds it."""


@dataclass(frozen=True)
class Curve:
    """A way to grow."""

    name: str
    points: list[ScalingPoint]


def scaling(
    config: Config,
    models: Models,
    cluster: Cluster,
    *,
    domains: int,
    storage_bytes_per_s: float,
) -> list[Curve]:
    """Strong scaling with the configured batch; with one that reaches MOST_GPUS; weak scaling.

    Weak scaling keeps a GPU's samples of a step as they are on `cluster`. A micro-batch is the configured one, or the
    largest that divides a GPU's samples.
    """
    batch = config.train.global_batch_samples

    def point(at: Cluster, samples: int) -> ScalingPoint:
        here = with_batch(config, samples, at.ranks)
        step = simulate_step(here, models, at, domains=domains, storage_bytes_per_s=storage_bytes_per_s)
        fits = plan_memory(here, models, at).fits
        micro = here.train.micro_batch_samples
        return ScalingPoint(at.ranks, samples, micro, step.seconds, step.tokens_per_s, step.mfu, fits)

    def strong(samples: int) -> Curve:
        points = [point(at, samples) for at in clusters(cluster) if samples % at.ranks == 0]
        return Curve(f"strong, {samples:,} samples a step", points)

    larger = batch_for_most(config)
    per_gpu = max(1, batch // cluster.ranks)
    weak = Curve(
        f"weak, {per_gpu:,} samples a GPU and step",
        [point(at, per_gpu * at.ranks) for at in clusters(cluster)],
    )
    return [strong(batch), *([strong(larger)] if larger > batch else []), weak]


def batch_for_most(config: Config) -> int:
    """The configured global batch, doubled until MOST_GPUS have a sample each."""
    samples = config.train.global_batch_samples
    while samples < MOST_GPUS:
        samples *= 2
    return samples


def with_batch(config: Config, samples: int, ranks: int) -> Config:
    """The run with that global batch: its micro-batch, or the largest below it that divides a rank's samples."""
    per_rank = samples // ranks
    most = min(config.train.micro_batch_samples, per_rank)
    micro = next(n for n in range(most, 0, -1) if per_rank % n == 0)
    return changed(config, train={"global_batch_samples": samples, "micro_batch_samples": micro})


def clusters(cluster: Cluster) -> Iterator[Cluster]:
    """2, 4, 8, ... GPUs of one node, then 1, 2, 4, ... whole nodes, up to MOST_GPUS."""
    gpus = 2
    while gpus < cluster.gpus_per_node:
        yield replace(cluster, nodes=1, gpus_per_node=gpus)
        gpus *= 2
    nodes = 1
    while nodes * cluster.gpus_per_node <= MOST_GPUS:
        if nodes * cluster.gpus_per_node > 1:
            yield replace(cluster, nodes=nodes)
        nodes *= 2


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
