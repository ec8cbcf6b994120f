"""A plan's models: what is known of them from config.json, or from the headers of their weights, alone.

Whether a run fits its devices: the estimate of `engine.memory_estimate` by parts, and the largest micro-batch. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddk_ds.config import Config
from ddk_ds.engine.flops import model_flops
from ddk_ds.engine.memory_estimate import MEMORY_MARGIN, MemoryEstimate, estimate_memory
from ddk_ds.engine.model_files import ModelFiles, ModelShape, configured_files, model_shape, read_model
from ddk_ds.errors import ConfigError
from ddk_ds.planner.gpus import Cluster


@dataclass(frozen=True)
class PlannedModel:
    """A model as a plan sees it."""

    shape: ModelShape
    forward_flops: float
    """Of one token, with the whole square of attention."""
    source: str
    """What was read."""

    @property
    def head_flops(self) -> float:
        """Of one token, the part of `forward_flops` that the output head has."""
        return 2.0 * self.shape.head


def describe(files: ModelFiles, sequence_length: int, source: str) -> PlannedModel:
    """What a plan needs of these files."""
    return PlannedModel(model_shape(files), model_flops(files, sequence_length, causal=False), source)


def find_model(path: str, key: str, directories: tuple[Path, ...], sequence_length: int) -> PlannedModel:
    """The model that `path` names: a directory with weights or with config.json alone, or a config.json's own path.

    Of a hub name, the file `<last part>.json` in one of `directories`. Nothing is downloaded and no weight is read.

    Raises:
        ConfigError: there is none, or it describes no causal language model; names the configuration `key`.
    """
    place = Path(path)
    if (place / "model.safetensors").is_file() or (place / "model.safetensors.index.json").is_file():
        return describe(read_model(place, key), sequence_length, f"headers of the weights in {place}")
    tried = [place / "config.json", place, *(directory / f"{place.name}.json" for directory in directories)]
    config = next((file for file in tried if file.is_file()), None)
    if config is None:
        places = ", ".join(map(str, directories))
        raise ConfigError(
            f"{key}: {path} is no directory with a config.json, and {place.name}.json is not in {places}: save the "
            f"model's config.json there, or give its path: {key}=path/to/config.json"
        )
    return describe(_configured(config, key), sequence_length, str(config))


def _configured(config: Path, key: str) -> ModelFiles:
    try:
        return configured_files(config)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{key}: {config} cannot be read as JSON: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{key}: {config} describes no causal language model that transformers can build: {reason}. It must be "
            "a whole config.json with its model_type; of a model with code of its own, give the directory with weights"
        ) from error


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
    """`engine.memory_estimate`'s estimate of one GPU of the cluster."""
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
