"""The simulated step on many clusters, with every place of the teacher's weights, and with other options. Pure.

`simulate_scaling` varies the number of GPUs and the batch; `simulate_layouts` the number of GPUs, the network, where
the teacher's weights lie and in how many bits; `simulate_variants` any options of the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import get_args

from ddk_ds.config import Config, load_config
from ddk_ds.config.sections import Teacher
from ddk_ds.engine.eight_bits import LEAST_SHARE
from ddk_ds.engine.memory_estimate import fewest_passes
from ddk_ds.errors import ConfigError
from ddk_ds.planner.gpu_memory import changed, estimate, fits, holds, placed
from ddk_ds.planner.gpus import Cluster, Gpu
from ddk_ds.planner.layer_time import ROUNDED_BYTES
from ddk_ds.planner.plan_inputs import Models, find_inputs
from ddk_ds.planner.step_time import NOT_HIDDEN, simulate_step

MOST_GPUS = 1024
LINKS_BYTES_PER_S = (3e9, 25e9, 100e9)
"""Networks that layouts are compared on: bytes/s for each GPU, one direction."""
LAYOUTS = (("world", False), ("world", True), ("node", False), ("node", True), ("gpu", False))
"""`teacher.shard_within`, and True where a pass takes as many micro-batches as memory holds.

Within a GPU nothing is gathered, so that fewer passes save nothing there.
"""
_EQUAL = 0.01
"""Speeds that differ by a smaller share count as equal: the simulation is no better than that."""


@dataclass(frozen=True)
class ScalingPoint:
    """The simulated step on one number of GPUs."""

    gpus: int
    global_batch_samples: int
    micro_batch_samples: int
    step_s: float
    tokens_per_s: float
    mfu: float
    fits: bool
    """True if a device's memory holds it."""


@dataclass(frozen=True)
class Curve:
    """The points of strong or weak scaling, by number of GPUs."""

    name: str
    points: list[ScalingPoint]


def simulate_scaling(
    config: Config, models: Models, cluster: Cluster, *, domains: int, storage_bytes_per_s: float
) -> list[Curve]:
    """Simulate strong scaling with the configured batch and with one that reaches MOST_GPUS, and weak scaling.

    Weak scaling keeps the samples of a GPU and step as they are on `cluster`. The micro-batch is the configured one,
    or the largest smaller one that divides a GPU's samples.
    """

    def point(at: Cluster, samples: int) -> ScalingPoint:
        scaled = placed(_with_batch(config, samples, at.ranks), models, at)
        step = simulate_step(scaled, models, at, domains=domains, storage_bytes_per_s=storage_bytes_per_s)
        return ScalingPoint(
            at.ranks,
            samples,
            scaled.train.micro_batch_samples,
            step.seconds,
            step.tokens_per_s,
            step.mfu,
            fits(scaled, models, at),
        )

    def strong(samples: int) -> Curve:
        points = [point(at, samples) for at in clusters(cluster) if samples % at.ranks == 0]
        return Curve(f"strong, {samples:,} samples a step", points)

    batch, larger = config.train.global_batch_samples, _batch_for_most(config)
    per_gpu = max(1, batch // cluster.ranks)
    weak = Curve(
        f"weak, {per_gpu:,} samples a GPU and step",
        [point(at, per_gpu * at.ranks) for at in clusters(cluster)],
    )
    return [strong(batch), *([strong(larger)] if larger > batch else []), weak]


def clusters(cluster: Cluster) -> Iterator[Cluster]:
    """Yield 2, 4, 8, ... GPUs of one node, then 1, 2, 4, ... complete nodes, up to MOST_GPUS."""
    gpus = 2
    while gpus < cluster.gpus_per_node:
        yield replace(cluster, nodes=1, gpus_per_node=gpus)
        gpus *= 2
    yield from (at for at in _complete_nodes(cluster) if at.ranks > 1)


def _complete_nodes(cluster: Cluster) -> Iterator[Cluster]:
    nodes = 1
    while nodes * cluster.gpus_per_node <= MOST_GPUS:
        yield replace(cluster, nodes=nodes)
        nodes *= 2


def _batch_for_most(config: Config) -> int:
    """Double the configured global batch until it has at least MOST_GPUS samples, and return it."""
    samples = config.train.global_batch_samples
    while samples < MOST_GPUS:
        samples *= 2
    return samples


def _with_batch(config: Config, samples: int, ranks: int) -> Config:
    """Return the configuration with `samples` as the global batch.

    Its micro-batch is the configured one, or the largest smaller one that divides the samples of a rank.
    """
    per_rank = samples * config.train.sequence_parallel // ranks
    largest = min(config.train.micro_batch_samples, per_rank)
    micro_batch = next(n for n in range(largest, 0, -1) if per_rank % n == 0)
    return changed(config, train={"global_batch_samples": samples, "micro_batch_samples": micro_batch})


@dataclass(frozen=True)
class LayoutPoint:
    """The simulated step with one place of the teacher's weights, on one cluster."""

    link_bytes_per_s: float
    """Bandwidth of the network for each GPU, one direction."""
    gpus: int
    quantize: str
    shard_within: str
    micro_batches_per_pass: int
    tokens_per_s_per_gpu: float
    device_bytes: int
    fits: bool
    several: bool
    """True if more than one micro-batch a pass was looked for."""

    @property
    def name(self) -> str:
        """Return the label in tables and pictures: `node`, or `node, n a pass` if several micro-batches were tried."""
        return f"{self.shard_within}, n a pass" if self.several else self.shard_within


def simulate_layouts(
    config: Config, models: Models, cluster: Cluster, *, domains: int, storage_bytes_per_s: float
) -> list[LayoutPoint]:
    """Simulate every layout on 1, 2, 4, ... nodes like those of `cluster`, up to MOST_GPUS, by three networks.

    Each with every `teacher.quantize` that a run on these GPUs would accept.

    The batch is the configured one, doubled until MOST_GPUS have a sample each. Raises ConfigError without a teacher.
    """
    if config.teacher is None or models.teacher is None:
        raise ConfigError(f"--layouts: method {config.method} has no teacher whose weights could lie anywhere")
    samples = _batch_for_most(config)
    points = []
    for link in LINKS_BYTES_PER_S:
        gpu = cluster.gpu.model_copy(update={"network_bytes_per_s": link})
        for at in _complete_nodes(replace(cluster, gpu=gpu)):
            batched = _with_batch(config, samples, at.ranks)
            forms = forms_of(batched, models, gpu)
            points += layouts_on(
                batched, models, at, domains=domains, storage_bytes_per_s=storage_bytes_per_s, forms=forms
            )
    return points


def forms_of(config: Config, models: Models, gpu: Gpu) -> list[str]:
    """Return the values of `teacher.quantize`, "none" first, that a run on this GPU would accept.

    Products in 8 bits need a GPU and a precision that have them. Half of the teacher's matrices must fit into the
    format. The run has a teacher.
    """
    teacher = config.teacher
    assert teacher is not None and models.teacher is not None, "the run has no teacher"
    shape, precision = models.teacher.shape, config.train.precision
    forms = []
    for form in get_args(Teacher.model_fields["quantize"].annotation):
        missing = form in ROUNDED_BYTES and gpu.peak_in_8_bits(form) is None
        all_layers = teacher.model_copy(update={"quantize": form, "quantize_skip_layers": ()})
        fitting = shape.quantized(all_layers, precision)
        few = not fitting or sum(m.elements for m in fitting) < LEAST_SHARE * sum(m.elements for m in shape.matrices)
        if form == "none" or (all_layers.multiplies_in(precision) and not missing and not few):
            forms.append(form)
    return forms


def layouts_on(
    config: Config, models: Models, at: Cluster, *, domains: int, storage_bytes_per_s: float, forms: Sequence[str]
) -> list[LayoutPoint]:
    """Simulate every layout of the teacher's weights on one cluster, with each of the values `forms` of `quantize`.

    The configuration has a teacher.
    """

    def point(form: str, within: str, several: bool) -> LayoutPoint:
        place = {"quantize": form, "shard_within": within, "micro_batches_per_pass": 1}
        one_each = changed(config, teacher=place)
        most = one_each.micro_batches(at.ranks) if several else 1
        chosen = fewest_passes(one_each, most, lambda tried: fits(tried, models, at))
        step = simulate_step(chosen, models, at, domains=domains, storage_bytes_per_s=storage_bytes_per_s)
        device_bytes = estimate(chosen, models, at).device_bytes
        return LayoutPoint(
            link_bytes_per_s=at.gpu.network_bytes_per_s,
            gpus=at.ranks,
            quantize=form,
            shard_within=within,
            micro_batches_per_pass=chosen.teacher_pass_size,
            tokens_per_s_per_gpu=step.tokens_per_s / at.ranks,
            device_bytes=device_bytes,
            fits=holds(at, device_bytes),
            several=several,
        )

    offloads = config.teacher is not None and config.teacher.offload_params != "none"
    layouts = [layout for layout in LAYOUTS if not (layout[0] == "gpu" and offloads)]
    return [point(form, *layout) for form in forms for layout in layouts]


def advised(points: Sequence[LayoutPoint]) -> LayoutPoint | None:
    """Return the fastest of one cluster's layouts that fit into memory, or None if none fits.

    Layouts that are at most `_EQUAL` (a share) slower count as equally fast; the one with the least memory is chosen.
    """
    fitting = [point for point in points if point.fits]
    best = max((point.tokens_per_s_per_gpu for point in fitting), default=0.0)
    equal = [point for point in fitting if point.tokens_per_s_per_gpu >= (1 - _EQUAL) * best]
    return min(equal, key=lambda point: point.device_bytes, default=None)


@dataclass(frozen=True)
class Variant:
    """The simulated step with one combination of options."""

    overrides: tuple[str, ...]
    """The options as they are written on the command line, key=value."""
    step_s: float
    tokens_per_s: float
    mfu: float
    not_hidden: dict[str, float]
    """Share of the step that is communication behind no computation, by model ("teacher", "student")."""
    fits: bool


def simulate_variants(
    config_file: Path,
    overrides: Sequence[str],
    varied: Sequence[str],
    cluster: Cluster,
    *,
    model_dirs: tuple[Path, ...],
    storage_bytes_per_s: float,
) -> list[Variant]:
    """Simulate the step for every combination of the values in `varied`, whose items are "key=value,value,...".

    `overrides` ("key=value") hold for all combinations. Raises ConfigError if an item has another form, or if a
    combination is no valid configuration.
    """
    choices = []
    for item in varied:
        key, equals, values = item.partition("=")
        if not (key and equals and all(values.split(","))):
            raise ConfigError(f"--vary {item}: write key=value,value,...")
        choices.append([f"{key}={value}" for value in values.split(",")])
    variants = []
    for combination in product(*choices):
        config = load_config(config_file, [*overrides, *combination])
        models, data = find_inputs(config, model_dirs)
        config = placed(config, models, cluster)
        step = simulate_step(config, models, cluster, domains=data.domains, storage_bytes_per_s=storage_bytes_per_s)
        not_hidden = {
            model: step.parts[f"{model}: {NOT_HIDDEN}"] / step.seconds
            for model in ("teacher", "student")
            if f"{model}: {NOT_HIDDEN}" in step.parts
        }
        fitting = fits(config, models, cluster)
        variants.append(Variant(combination, step.seconds, step.tokens_per_s, step.mfu, not_hidden, fitting))
    return variants
