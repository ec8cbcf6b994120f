"""Estimate of the device's and the host's memory that a run needs, by parts, before any model is loaded. Pure.

These are assumptions, not measurements:

- A rank holds 1 / n, rounded up, of everything that ZeRO-3 shards over n ranks. In addition every rank holds all
  tensors of at most `param_persistence_threshold` elements completely; with `student.whole_layers` there are none.
- Up to `max_live_parameters` elements of the student stay gathered between forward and backward pass, because a layer
  is used again soon. The teacher has no backward pass: one layer (or its embedding) is gathered, and the next one is
  prefetched (engine/ds_config.py). On a GPU two more layers of each are released and not yet computed, since the host
  runs ahead by as many (engine/gather_brake.py).
- A teacher within a GPU is never gathered. In 8 bits it is loaded complete in the compute dtype before the student is
  there, and then converted layer by layer.
- A CUDA graph keeps the memory of the activations that are computed in it, for the whole run.
- A layer's activations are those of a block like Llama's: two norms in float32; attention without stored scores,
  except `eager`; an MLP, gated unless its tensors have the names of one without a gate. With gradient checkpointing
  each layer keeps its input, and with "selective" also the results of its matrix products and attention; one layer at
  a time has all its activations. With `student.offload_activations` those inputs are on the host, in pinned memory, of
  which torch takes the next power of two. A teacher keeps nothing: the intermediate results of one layer exist at a
  time.
- Masks of attention are numbers (B, L, L) in the compute dtype, one for all layers with a window that is shorter than a
  sample, and one for all others with `eager` or where documents may be kept apart; none with flash_attention_2.
- A mixture of experts copies each token for each expert that it is sent to, and keeps each expert's result. A layer is
  gathered with all of its experts.
- DeepSpeed allocates a complete bucket of `reduce_bucket_size` gradients, and a second one in which the gradients of
  the first are joined, both in `train.reduce_dtype`. A larger tensor is reduced by itself: it is converted to that
  dtype if it has another, and copied once more if the ranks do not divide it. On a CPU memory is only taken for the
  pages that gradients are written to.
- A process's libraries take CONTEXT_BYTES of a GPU (CUDA's context, cuBLAS) and PROCESS_BYTES of the host. Where there
  are several ranks, NCCL takes COMMUNICATOR_BYTES for each of COMMUNICATORS process groups: torch's and DeepSpeed's of
  all ranks, the node's, and one more that a library or an option makes. NCCL's buffers are 0.5 to 1 GB on nodes of 8.
- Holes that the allocator leaves are not counted: a tenth of the device should stay free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ddk_ds.config import Config, Model
from ddk_ds.config.sections import Teacher
from ddk_ds.engine.ds_config import RELIED_ON, WHOLE_LAYERS_ZERO, bucket_sizes, lead_elements
from ddk_ds.engine.model_files import COMPUTE_BYTES, ModelShape
from ddk_ds.kernels.options import GROUP_CHUNKS, default_chunk_tokens, padded

CONTEXT_BYTES = 1_000_000_000
COMMUNICATORS, COMMUNICATOR_BYTES = 4, 750_000_000
PROCESS_BYTES = 800_000_000
# Bytes for each weight: float32 master weight and AdamW's two moments; float32 sum of the micro-batches' gradients.
OPTIMIZER_BYTES, GRADIENT_BYTES = 12, 4
REDUCE_BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of a gradient on the way between ranks, by `train.reduce_dtype`."""
PLACES = ("gpu", "node", "world")
"""Places of the teacher's weights that `teacher.shard_within: auto` tries, the fastest first."""
MEMORY_MARGIN = 0.9
"""Share of a memory that a plan can use; the rest is for the allocator's holes and the estimate's errors."""

_LIBRARIES = "CUDA context and NCCL"
_SIZES = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "sub_group_size")
# Buffers that DeepSpeed pins for offloading to nvme: 5 of 1e8 elements of parameters, 4 sub-groups of the optimizer.
_NVME_PARAMETERS, _NVME_SUB_GROUPS = 500_000_000, 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of memory that one rank needs, by parts."""

    resident: dict[str, int]
    """Bytes on the device during the complete run."""
    passes: dict[str, int]
    """Bytes on the device at the peak of a micro-batch's forward and backward pass."""
    update: dict[str, int]
    """Bytes on the device during the optimizer's update, when nothing of `passes` is held."""
    host: dict[str, int]
    """Bytes in the host's memory."""
    loading: dict[str, int] = field(default_factory=dict)
    """Bytes on the device while the teacher is loaded, when nothing else is held than the libraries."""

    @property
    def parts(self) -> dict[str, int]:
        """Return all parts by name. Those of `passes`, of `update` and of `loading` are never held at the same time."""
        return {**self.resident, **self.passes, **self.update, **self.host, **self.loading}

    @property
    def device_bytes(self) -> int:
        """Return the largest number of bytes that the rank holds on its device at a time."""
        trained = sum(self.resident.values()) + max(sum(self.passes.values()), sum(self.update.values()))
        return max(trained, self.resident.get(_LIBRARIES, 0) + sum(self.loading.values()))

    @property
    def host_bytes(self) -> int:
        """Return the bytes that the rank holds in the host's memory, without `device_bytes` of a CPU."""
        return sum(self.host.values())

    @property
    def total(self) -> int:
        """Return the sum of device and host bytes: if the device is the CPU, both are in the host's memory."""
        return self.device_bytes + self.host_bytes


def estimate_memory(
    config: Config,
    student: ModelShape,
    teacher: ModelShape | None,
    vocab_size: int,
    world_size: int,
    device_type: str = "cuda",
    ranks_per_node: int | None = None,
) -> MemoryEstimate:
    """Estimate the bytes of memory that one of `world_size` ranks needs.

    A node with n ranks needs n times the estimate's host bytes. `ranks_per_node` decides the size of the teacher's
    shards if `teacher.shard_within` is node; None: all ranks are on one node.
    """
    zero = _zero_sizes(config, student)
    compute = COMPUTE_BYTES[config.train.precision]
    libraries = CONTEXT_BYTES + (COMMUNICATORS * COMMUNICATOR_BYTES if world_size > 1 else 0)
    resident = {_LIBRARIES: libraries if device_type == "cuda" else 0}
    host = {"process": PROCESS_BYTES} | _inputs_on_host(config, student, compute, device_type)
    weights: dict[str, tuple[Model, ModelShape]] = {"student shards": (config.student, student)}
    loading: dict[str, int] = {}
    per_pass, converted = 1, 0  # micro-batches in one pass of the teacher; bytes of a layer's experts out of 8 bits
    if config.teacher is None or not config.loads_teacher:
        teacher = None
    else:
        at_once = config.train.micro_batch_samples * world_size // config.train.sequence_parallel
        micro_batches = config.train.global_batch_samples // max(1, at_once)
        per_pass = max(1, min(config.teacher.pass_size, micro_batches))
        if teacher is not None:
            if config.teacher.quantize != "none" and config.teacher.place == "gpu":
                whole = teacher.parameters + max(teacher.tensors)
                loading = {"teacher before it has 8 bits": compute * whole}
            if config.teacher.quantize != "none" and teacher.experts_per_token:
                converted = compute * teacher.largest_layer
            teacher = teacher.as_sharded(config.teacher, config.train.precision)
            weights["teacher shards"] = (config.teacher, teacher)
    for name, (model, shape) in weights.items():
        place = {"none": resident, "cpu": host, "nvme": {}}[model.offload_params]
        place[name] = compute * shape.shard(shard_ranks(model, world_size, ranks_per_node))
        if model.offload_params == "nvme":
            host[f"{name}: nvme buffers"] = compute * _NVME_PARAMETERS
    update = _add_optimizer(resident, host, config, student.shard(world_size), zero["sub_group_size"])
    bucket = zero["reduce_bucket_size"]
    reduced = REDUCE_BYTES[config.train.reduce_dtype]
    resident["gradient bucket"] = reduced * (bucket if device_type == "cuda" else min(bucket, student.parameters))
    small = sum(size for size in student.tensors if size <= zero["param_persistence_threshold"])
    resident["small parameters"] = compute * small
    passes = _passes(config, student, teacher, vocab_size, zero, device_type, per_pass)
    if teacher is not None and config.teacher is not None and config.teacher.compiled_whole and device_type == "cuda":
        tokens, length = config.micro_batch_tokens, config.data.sequence_length
        resident["teacher's CUDA graph"] = _forward_activations(config.teacher, teacher, tokens, length, compute)
    if converted:
        passes["teacher's experts out of 8 bits"] = converted
    passes["gradients joined for the reduction"] = _joined_bytes(student, bucket, world_size, compute, reduced)
    return MemoryEstimate(resident, passes, update, host, loading)


def _inputs_on_host(config: Config, student: ModelShape, compute: int, device_type: str) -> dict[str, int]:
    if config.student.offload_activations == "none":
        return {}
    layer_input = config.micro_batch_tokens * student.hidden * compute
    pinned = 1 << (layer_input - 1).bit_length() if device_type == "cuda" else layer_input
    return {"inputs of the student's layers": student.layers * pinned}


def _zero_sizes(config: Config, student: ModelShape) -> dict[str, int]:
    """Return ZeRO-3's sizes in elements, by DeepSpeed's keys without "stage3_", for the student's engine.

    Section `deepspeed:` changes them for the student alone; the teacher's engine has the defaults.
    """
    raw = config.deepspeed.get("zero_optimization", {})
    defaults = {key: RELIED_ON[f"zero_optimization.{key}"] for key in _SIZES} | bucket_sizes(student.largest_layer)
    if config.student.whole_layers:
        defaults |= WHOLE_LAYERS_ZERO
    sizes = {key.removeprefix("stage3_"): size for key, size in defaults.items()}
    return {name: int(raw.get(f"stage3_{name}", raw.get(name, default))) for name, default in sizes.items()}


def _joined_bytes(student: ModelShape, bucket: int, world_size: int, compute: int, reduced: int) -> int:
    """Return the bytes of what is allocated for a reduction; a gradient has `compute` bytes, on the wire `reduced`."""
    alone = (size * ((reduced != compute) + (size % world_size != 0)) for size in set(student.tensors) if size > bucket)
    return reduced * max(min(bucket, student.parameters), *alone, 0)


def _add_optimizer(
    resident: dict[str, int], host: dict[str, int], config: Config, shard: int, max_sub_group: int
) -> dict[str, int]:
    """Add the optimizer's parts for a `shard` of elements to `resident` and `host`; return the parts of the update."""
    offload = config.optimizer.offload
    place = {"none": resident, "cpu": host, "nvme": {}}[offload]
    place["master weights and moments"] = OPTIMIZER_BYTES * shard
    (resident if offload == "none" else host)["gradient sums"] = GRADIENT_BYTES * shard
    sub_group = min(shard, max_sub_group)
    if offload == "nvme":
        host["optimizer: nvme buffers"] = 4 * _NVME_SUB_GROUPS * sub_group
    if config.checkpoint.in_background:
        host["checkpoint's copy"] = (OPTIMIZER_BYTES + COMPUTE_BYTES[config.train.precision]) * shard
    # A sub-group's gradients as one float32 tensor, and an intermediate result of AdamW of the same size.
    update = {"gradient and intermediate of the update": 2 * 4 * sub_group}
    if offload == "none":
        return update
    host |= update
    return {}


def fewest_passes(config: Config, micro_batches: int, fits: Callable[[Config], bool]) -> Config:
    """Return the configuration with the fewest passes of the teacher, over a step's micro-batches, that `fits` accepts.

    All passes take equally many micro-batches, except that the last one can take fewer. If nothing fits, each pass
    takes one micro-batch.
    """
    for passes in range(1, micro_batches):
        candidate = _with_teacher(config, micro_batches_per_pass=math.ceil(micro_batches / passes))
        if fits(candidate):
            return candidate
    return _with_teacher(config, micro_batches_per_pass=1)


def settled_place(config: Config, fits: Callable[[Config], bool]) -> Config:
    """Return the configuration with the first of `PLACES` that `fits` accepts in place of `teacher.shard_within: auto`.

    If nothing fits, it is the last one, which takes the least memory.
    """
    if config.teacher is None or config.teacher.shard_within != "auto":
        return config
    placed = [_with_teacher(config, shard_within=place) for place in PLACES]
    return next((candidate for candidate in placed if fits(candidate)), placed[-1])


def fits_into(
    usable: float,
    shapes: tuple[ModelShape, ModelShape | None],
    vocab_size: int,
    world_size: int,
    local_ranks: int,
    device_type: str,
) -> Callable[[Config], bool]:
    """Return a function that is True for a configuration whose estimated memory fits into `usable` bytes. Pure."""

    def fits(config: Config) -> bool:
        estimate = estimate_memory(config, *shapes, vocab_size, world_size, device_type, local_ranks)
        return (estimate.total if device_type == "cpu" else estimate.device_bytes) <= usable

    return fits


def _with_teacher(config: Config, **values: Any) -> Config:
    assert config.teacher is not None, "the run has no teacher"
    return config.model_copy(update={"teacher": config.teacher.model_copy(update=values)})


def shard_ranks(model: Model, world_size: int, ranks_per_node: int | None) -> int:
    """Return the number of ranks over which one copy of a model's weights is sharded."""
    within = model.place if isinstance(model, Teacher) else "world"
    return {"world": world_size, "node": min(ranks_per_node or world_size, world_size), "gpu": 1}[within]


def _passes(
    config: Config,
    student: ModelShape,
    teacher: ModelShape | None,
    vocab_size: int,
    zero: dict[str, int],
    device_type: str,
    per_pass: int,
) -> dict[str, int]:
    """Return the bytes on the device, by parts, at the peak of a micro-batch's forward and backward pass.

    Args:
        zero: ZeRO-3's sizes in elements, from `_zero_sizes`.
        per_pass: number of micro-batches in one pass of the teacher.
    """
    compute = COMPUTE_BYTES[config.train.precision]
    tokens = config.micro_batch_tokens
    largest = max(student.largest_layer, student.head)
    lead = lead_elements(student.largest_layer) if device_type == "cuda" else 0
    live = min(student.parameters, max(zero["max_live_parameters"], largest) + zero["prefetch_bucket_size"] + lead)
    chunk = min(tokens, config.loss.chunk_tokens or default_chunk_tokens(vocab_size, device_type))
    logits = 4 if config.loss.logits_dtype == "float32" else compute
    # Half-precision gradients of several chunks wait for one matmul; in the logits' dtype they lie over the student's.
    over_logits = compute == logits == 2
    grouped = compute == 2 and (device_type == "cuda" or not over_logits)
    models = (teacher is not None) + (not over_logits)
    parts = {
        "student gathered": compute * live,
        "gradients of a layer": compute * largest,
        # The sum in float32, and the same rounded to the parameter's dtype.
        "head's weight gradient": (4 + compute) * student.head,
        "hidden states": tokens
        * (student.hidden * (compute + 4) + (per_pass * teacher.hidden * compute if teacher else 0)),
        "logits of a chunk": chunk * padded(vocab_size) * logits * models,
        "activations": _activations(config, student, tokens, compute),
    }
    masks = _mask_bytes(config, config.student, student, compute)
    if compute == 2:
        group = min(tokens, GROUP_CHUNKS * chunk) if grouped else chunk
        parts["logits' gradients"] = group * padded(vocab_size) * compute
    if teacher is not None and config.teacher is not None:
        layer = _forward_activations(config.teacher, teacher, tokens, config.data.sequence_length, compute)
        layer += tokens * _product_bytes(config.teacher, teacher, config.train.precision)
        if config.teacher.place != "gpu":
            # A layer's input and output are those of all micro-batches of the pass; inside, one is computed at a time.
            layer += 2 * (per_pass - 1) * tokens * teacher.hidden * compute
            parts["teacher gathered"] = compute * teacher_gathered(teacher, device_type)
        at_once = 1 if config.teacher.place == "gpu" else per_pass
        masks = max(masks, at_once * _mask_bytes(config, config.teacher, teacher, compute))
        # The teacher's activations are released before the student's begin.
        parts["activations"] = max(parts["activations"], layer)
    if masks:  # made from truth values, before the layers' activations are there
        made_from = config.train.micro_batch_samples * config.data.sequence_length**2
        parts["masks of attention"] = masks + max(0, made_from - parts["activations"])
    return parts


def _mask_bytes(config: Config, model: Model, shape: ModelShape, compute: int) -> int:
    """Return the bytes of the masks that a micro-batch may need; its layers share them.

    They are of layers with a window that is shorter than a sample, and of the others: eager always has one, and to keep
    documents apart sdpa, on a GPU if they are short. `data.documents: auto` counts as masked.
    """
    kernel = _kernel(model, shape)
    if kernel == "flash_attention_2":
        return 0
    of_windows = 0 < shape.window < config.data.sequence_length
    masks = of_windows + (kernel == "eager" or config.data.documents != "joined")
    return masks * config.train.micro_batch_samples * config.data.sequence_length**2 * compute


def _kernel(model: Model, shape: ModelShape) -> str:
    return shape.best_kernel if model.attn_implementation == "auto" else model.attn_implementation


def teacher_gathered(teacher: ModelShape, device_type: str) -> int:
    """Return the most elements of the teacher's weights that are gathered at a time.

    They are its embedding and the prefetched layer, or a layer and the prefetched one, or its head; before the latter
    two come the layers that are released and not yet computed.
    """
    lead = lead_elements(teacher.largest_layer) if device_type == "cuda" else 0
    layer, prefetch = teacher.largest_layer, bucket_sizes(teacher.largest_layer)["stage3_prefetch_bucket_size"]
    return min(teacher.parameters, max(teacher.head + prefetch, lead + layer + prefetch, lead + teacher.head))


def _activations(config: Config, shape: ModelShape, tokens: int, compute: int) -> int:
    layer = _layer_activations(config.student, shape, tokens, config.data.sequence_length, compute)
    # Gradients on their way back through an MLP, in addition to the activations that it keeps.
    mlp_gradients = 2 * tokens * shape.intermediate * compute
    kept = {
        False: layer,
        True: 0 if config.student.offload_activations == "cpu" else tokens * shape.hidden * compute,
        "selective": tokens * (_products(shape) * compute + 4 * shape.heads),
    }[config.student.gradient_checkpointing]
    # Recomputed activations are held for one layer at a time.
    return shape.layers * kept + (layer if config.student.gradient_checkpointing else 0) + mlp_gradients


def _product_bytes(model: Teacher, shape: ModelShape, precision: str) -> int:
    """Return the bytes for each token of the largest product in 8 bits, beside what a product in bf16 has.

    Its input over the scales is in float32 and rounded to 8 bits. In int8_dynamic the sums are in int32, and then in
    float32, beside the rounded input.
    """
    sums = 8 if model.quantize == "int8_dynamic" else 0
    matrices = shape.multiplied_in_8_bits(model, precision)
    return max((max(5 * m.shape[1], m.shape[1] + sums * m.shape[0]) for m in matrices), default=0)


def _products(shape: ModelShape) -> int:
    """Return the elements for each token of a layer's input, its matrix products and its attention's results."""
    attention = 2 * shape.attention + 2 * shape.key_value
    experts = shape.experts_per_token * shape.hidden
    return attention + 3 * shape.hidden + experts + (2 if shape.gated else 1) * shape.intermediate


def _layer_activations(model: Model, shape: ModelShape, tokens: int, length: int, compute: int) -> int:
    """Return the bytes that a layer keeps for its backward pass."""
    norms = 2 * shape.hidden * (4 + 2 * compute)
    # Only flash_attention_2 accepts grouped keys and values. For other implementations transformers repeats them, but
    # makes a view of a single head.
    kernel = _kernel(model, shape)
    repeated = kernel != "flash_attention_2" and shape.key_value > shape.attention // shape.heads
    attention = compute * (2 * shape.attention + 2 * (shape.attention if repeated else shape.key_value))
    if kernel == "eager":
        attention += shape.heads * length * (4 + 2 * compute)  # scores, their softmax in float32, the same rounded
    if shape.normed_heads:  # in float32, and the same rounded
        attention += (4 + compute) * (shape.attention + shape.key_value)
    experts = 2 * shape.experts_per_token * shape.hidden * compute
    return tokens * (norms + attention + experts + compute * (4 if shape.gated else 2) * shape.intermediate)


def _forward_activations(model: Model, shape: ModelShape, tokens: int, length: int, compute: int) -> int:
    """Return the most bytes that a layer holds at a time in a pass without a backward pass.

    They are the residual stream with its copies and, whichever is more, those of the MLP (gate, up and their product;
    of experts also each token's copies, results and weighted results) or those of attention.
    """
    kernel = _kernel(model, shape)
    repeated = kernel != "flash_attention_2" and shape.key_value < shape.attention
    attention = compute * ((5 if repeated else 3) * shape.attention + 4 * shape.key_value)
    if kernel == "eager":
        attention += shape.heads * length * (4 + 2 * compute)
    if shape.normed_heads:  # before queries and keys are rotated: queries, and three results of the norm in float32
        attention = max(attention, (compute + 3 * 4) * shape.attention)
    mlp = 3 * compute * (shape.intermediate + shape.experts_per_token * shape.hidden)
    return tokens * (4 * compute * shape.hidden + max(mlp, attention))
