"""Config -> the dictionaries that DeepSpeed takes. Pure: no torch, no DeepSpeed, no files.

Sizes of what ZeRO-3 gathers ahead and reduces together. Pure.

DeepSpeed's own defaults know no model: 5e8 gradients a bucket, 1 GB of bf16 that is allocated whole beside 1 GB in
which what is in it is joined, and 5e7 weights gathered ahead, which is less than a matrix of a 14 B model's MLP. A
layer is what computes while communication goes on, so a layer's weights are gathered while the one before computes, and
a layer's gradients are reduced while the one below computes. A tensor larger than a bucket is reduced by itself. No
number of the run depends on either.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ddk_ds.config import Config, Model
from ddk_ds.errors import ConfigError

_DEEPSPEEDS: Mapping[str, int] = MappingProxyType({})
# DeepSpeed keys that follow from our own (None: that are fixed); given raw, they may only repeat the value.
_OURS: dict[str, str | None] = {
    "train_batch_size": "train.global_batch_samples",
    "train_micro_batch_size_per_gpu": "train.micro_batch_samples",
    "gradient_accumulation_steps": "train.global_batch_samples and train.micro_batch_samples",
    "gradient_clipping": "optimizer.clip_norm",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "optimizer": "optimizer",
    "scheduler": "optimizer.warmup_steps and optimizer.min_learning_rate",
    "zero_optimization.stage": None,
    "zero_optimization.offload_optimizer": "optimizer.offload",
    "zero_optimization.offload_param": "student.offload_params",
    "zero_optimization.leaf_module": "student.leaf_modules",
    "data_types.grad_accum_dtype": None,
}


def student_ds_config(config: Config, world_size: int, buckets: Mapping[str, int] = _DEEPSPEEDS) -> dict[str, Any]:
    """DeepSpeed dictionary of the student's training engine on `world_size` ranks.

    `buckets` are those of engine/ds_config.py, or DeepSpeed's own defaults.

    Raises ConfigError where batch sizes do not divide or a raw `deepspeed:` key contradicts the configuration.
    """
    ours = {
        "train_batch_size": config.train.global_batch_samples,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_samples,
        "gradient_accumulation_steps": config.micro_batches(world_size),
        "gradient_clipping": config.optimizer.clip_norm,
        "steps_per_print": 2**31,
        # Without it ZeRO-3 refuses any optimizer that is not DeepSpeed's own; torch's AdamW is exact under it.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.train.precision == "bf16"},
        # The default accumulates micro-batches in the model's dtype, which loses small gradients in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {**_zero(config, config.student, config.optimizer.offload), **buckets},
    }
    return _merge(ours, config.deepspeed, "")


def teacher_ds_config(config: Config, buckets: Mapping[str, int] = _DEEPSPEEDS) -> dict[str, Any]:
    """DeepSpeed dictionary of the frozen teacher: ZeRO-3 partitions, no optimizer; `buckets` as for the student."""
    assert config.teacher is not None, "a run without a teacher asked for its engine"
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_samples,
        "steps_per_print": 2**31,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "zero_optimization": {**_zero(config, config.teacher, "none"), **buckets},
    }


def _zero(config: Config, model: Model, offload_optimizer: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3, "contiguous_gradients": True, "overlap_comm": True}
    for key, place in (("offload_param", model.offload_params), ("offload_optimizer", offload_optimizer)):
        if place != "none":
            zero[key] = {"device": place, "pin_memory": True}
            if place == "nvme":
                zero[key]["nvme_path"] = config.train.nvme_path
    if model.leaf_modules:
        zero["leaf_module"] = {"classes": list(model.leaf_modules)}
    return zero


def _merge(ours: dict[str, Any], raw: dict[str, Any], prefix: str) -> dict[str, Any]:
    merged = copy.deepcopy(ours)
    for key, value in raw.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value, path + ".")
        elif key in merged and merged[key] == value:
            continue
        elif (mine := _ours(path)) is not None:
            owner = _OURS[mine]
            raise ConfigError(
                f"deepspeed.{path}: {value!r} contradicts {merged.get(key, 'its absence')!r}, "
                + (f"which follows from {owner}; set that instead" if owner else "which is fixed; remove it")
            )
        else:
            merged[key] = value
    return merged


def _ours(path: str) -> str | None:
    """The key of ours that a dotted DeepSpeed key is or lies in."""
    parts = path.split(".")
    return next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in _OURS), None)


LEAST_BUCKET = 16_000_000
"""Elements: a collective of fewer takes mostly latency."""


def bucket_sizes(largest_layer: int) -> dict[str, int]:
    """DeepSpeed's keys by a model's largest layer, in elements."""
    size = max(LEAST_BUCKET, largest_layer)
    return {"reduce_bucket_size": size, "stage3_prefetch_bucket_size": size}
