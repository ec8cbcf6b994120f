"""DeepSpeed's configuration dictionaries, made from the run's configuration. Pure: no torch, no DeepSpeed, no files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ddk_ds.config import Config, Model
from ddk_ds.errors import ConfigError

MIN_BUCKET_ELEMENTS = 16_000_000
"""A collective of fewer elements takes mostly latency."""
LEAD_LAYERS = 2
"""Layers that the host queues on a GPU beyond the one that it computes: two hide a slow moment of the host."""
RELIED_ON: Mapping[str, Any] = MappingProxyType(
    {
        # Numbers. train/step.py multiplies the loss by the number of ranks, over which gradients are then averaged.
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean",
        "managed_gradient_accumulation": True,  # the engine counts micro-batches
        "bf16.check_grad_overflow": True,  # an update is left out if a gradient is not finite (train/guard.py)
        "bf16.bf16_master_weights_and_grads": False,
        "bf16.bf16_optimizer_states": False,
        "data_types.keep_in_fp32_modules": "auto",  # buffers that a model names, such as a router's bias
        "zero_optimization.zero_quantized_weights": False,
        "zero_optimization.zero_quantized_gradients": False,
        # Memory and time: memory_estimate.py and planner/step_time.py calculate with these.
        "zero_optimization.reduce_scatter": True,
        "zero_optimization.memory_efficient_linear": True,
        "zero_optimization.sub_group_size": 1_000_000_000,
        "zero_optimization.zero_hpz_partition_size": 1,
        "zero_optimization.stage3_max_live_parameters": 1_000_000_000,
        "zero_optimization.stage3_max_reuse_distance": 1_000_000_000,
        "zero_optimization.stage3_param_persistence_threshold": 100_000,
        "zero_optimization.stage3_allgather_sequential": False,
        "zero_optimization.stage3_module_granularity_threshold": 0,
        "zero_optimization.stage3_use_all_reduce_for_fetch_params": False,
    }
)
"""DeepSpeed's defaults that a run's numbers, memory or time rest on, by dotted key.

Its versions change defaults in silence: gradients were clipped only on request, and are clipped to 1.0 in 0.19. So
these are passed to it like all other keys, and tests/unit/engine/test_ds_config.py fails if the installed version has
another default. Three more are given by this project: `gradient_clipping` is `optimizer.clip_norm`, the timeout of the
process groups that of `limits:` (runtime.py), and the sizes of buckets follow from the model.
"""
WHOLE_LAYERS_ZERO: Mapping[str, int] = MappingProxyType({"stage3_param_persistence_threshold": 0})
"""Keys of a student whose layers are gathered as units.

DeepSpeed keeps tensors of up to that many elements on every rank, and gathers them one by one after each update: for 24
layers 121 gathers. A layer that is gathered as a unit brings its norms and biases along. A teacher has no updates.
"""
_REDUCE_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_DEFAULT_BUCKETS: Mapping[str, int] = MappingProxyType({})  # leaves the sizes to DeepSpeed
# By default a timer that nobody reads makes the host wait for the device before and after each micro-batch.
_NO_TIMERS = {"throughput": {"enabled": False}}
# DeepSpeed keys that follow from keys of the run's configuration, or are fixed (None). Section `deepspeed:` may repeat
# their values, but not change them.
_DERIVED_KEYS: dict[str, str | None] = {
    "train_batch_size": "train.global_batch_samples",
    "train_micro_batch_size_per_gpu": "train.micro_batch_samples",
    "gradient_accumulation_steps": "train.global_batch_samples and train.micro_batch_samples",
    "gradient_clipping": "optimizer.clip_norm",
    "bf16": "train.precision",
    "communication_data_type": "train.reduce_dtype",
    "fp16": "train.precision",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule and optimizer.warmup_steps",
    "zero_optimization.stage": None,
    "zero_optimization.offload_optimizer": "optimizer.offload",
    "zero_optimization.offload_param": "student.offload_params",
    "zero_optimization.leaf_module": "student.leaf_modules",
    "data_types.grad_accum_dtype": None,
}


def bucket_sizes(largest_layer: int) -> dict[str, int]:
    """Return DeepSpeed's keys for the sizes of gradient buckets and of prefetched weights, in elements.

    `largest_layer` is the number of elements of the model's largest layer. DeepSpeed's own defaults know no model: 5e8
    gradients a bucket, which is 2 GB of float32 always allocated and 2 GB more in which its content is joined, and 5e7
    prefetched weights, which is less than one matrix of a 14 B model's MLP. One layer is the unit in which
    computation overlaps communication: a layer's weights are gathered while the layer before computes, and its
    gradients are reduced while the layer below computes. A tensor larger than a bucket is reduced by itself. No number
    of the run depends on these sizes.
    """
    size = max(MIN_BUCKET_ELEMENTS, largest_layer)
    return {"reduce_bucket_size": size, "stage3_prefetch_bucket_size": size}


def teacher_sizes(largest_layer: int, head: int) -> dict[str, int]:
    """Return DeepSpeed's keys for the teacher's sizes, in elements: the prefetched weights, and the gathered ones.

    The second is for a teacher without whole layers: DeepSpeed would prefetch for each of a layer's matrices. The
    embedding is taken to be as large as the `head`.
    """
    sizes = bucket_sizes(largest_layer)
    return {**sizes, "stage3_max_live_parameters": max(largest_layer, head) + sizes["stage3_prefetch_bucket_size"]}


def lead_elements(largest_layer: int) -> int:
    """Return the most elements of gathered weights that await their computation when a further layer is gathered."""
    return LEAD_LAYERS * largest_layer


def student_ds_config(config: Config, world_size: int, buckets: Mapping[str, int] = _DEFAULT_BUCKETS) -> dict[str, Any]:
    """Return DeepSpeed's configuration of the student's training engine on `world_size` ranks.

    `buckets` are the keys that `bucket_sizes` returns; without them DeepSpeed's defaults hold.

    Raises ConfigError if batch sizes do not divide, or if a key of section `deepspeed:` contradicts another section.
    """
    zero = _zero(config, config.student, config.optimizer.offload)
    if config.student.whole_layers:
        zero |= WHOLE_LAYERS_ZERO
    derived = {
        "train_batch_size": config.train.global_batch_samples * config.train.sequence_parallel,  # as DeepSpeed counts
        "train_micro_batch_size_per_gpu": config.train.micro_batch_samples,
        "gradient_accumulation_steps": config.micro_batches(world_size),
        "gradient_clipping": config.optimizer.clip_norm,
        "steps_per_print": 2**31,
        "timers": _NO_TIMERS,
        # Without this key ZeRO-3 rejects every optimizer that is not DeepSpeed's own. torch's AdamW is exact under it.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.train.precision == "bf16"},
        # By default ranks add gradients in the model's dtype: on the way round a ring each sum is rounded once more.
        "communication_data_type": _REDUCE_DTYPES[config.train.reduce_dtype],
        # By default micro-batches are accumulated in the model's dtype, which loses small gradients in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {**zero, **buckets},
    }
    return _merge(_with_relied_on(derived), config.deepspeed, "")


def teacher_ds_config(config: Config, buckets: Mapping[str, int] = _DEFAULT_BUCKETS) -> dict[str, Any]:
    """Return DeepSpeed's configuration of the frozen teacher: ZeRO-3 without an optimizer.

    `buckets` are the keys that `bucket_sizes` returns; without them DeepSpeed's defaults hold.
    """
    assert config.teacher is not None, "the run has no teacher"
    derived = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_samples,
        "steps_per_print": 2**31,
        "timers": _NO_TIMERS,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "zero_optimization": {**_zero(config, config.teacher, "none"), **buckets},
    }
    return _with_relied_on(derived)


def _with_relied_on(derived: dict[str, Any]) -> dict[str, Any]:
    """Return `derived` with the keys of `RELIED_ON` that it leaves out."""
    complete = copy.deepcopy(derived)
    for path, value in RELIED_ON.items():
        *sections, key = path.split(".")
        place = complete
        for section in sections:
            place = place.setdefault(section, {})
        place.setdefault(key, value)
    return complete


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


def _merge(derived: dict[str, Any], raw: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return `derived` with the keys of `raw` added; `prefix` is the dotted path of both, for messages."""
    merged = copy.deepcopy(derived)
    for raw_key, value in raw.items():
        # DeepSpeed takes some keys of ZeRO-3 with and without this prefix, and of both the one with it.
        key = f"stage3_{raw_key}" if f"stage3_{raw_key}" in merged else raw_key
        path = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value, path + ".")
        elif key in merged and merged[key] == value:
            continue
        elif (derived_key := _derived_key(path)) is not None:
            source = _DERIVED_KEYS[derived_key]
            raise ConfigError(
                f"deepspeed.{path}: {value!r} contradicts {merged.get(key, 'its absence')!r}, "
                + (f"which follows from {source}; set that instead" if source else "which is fixed; remove it")
            )
        else:
            merged[key] = value
    return merged


def _derived_key(path: str) -> str | None:
    """Return the key of `_DERIVED_KEYS` that the dotted `path` is or lies in, or None."""
    parts = path.split(".")
    return next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in _DERIVED_KEYS), None)
