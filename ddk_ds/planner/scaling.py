"""Strong and weak scaling of the simulated step, on up to 1,024 GPUs. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ddk_ds.config import Config
from ddk_ds.planner.gpus import Cluster
from ddk_ds.planner.memory import Models, changed, plan_memory
from ddk_ds.planner.step import simulate_step

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
