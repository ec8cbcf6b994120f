"""What a run takes of a device's and of a host's memory, estimated part by part before any model is loaded. Pure.

Assumed, and not measured:

- A rank holds ceil(1 / n) of everything that ZeRO-3 shards over n ranks; tensors below `param_persistence_threshold`
  elements lie whole on every rank beside that.
- Of the student up to `max_live_parameters` elements stay gathered between forward and backward, since a layer's
  next use is near; the teacher, which only goes forward, holds a layer (or its embedding) and the next, gathered ahead
  (engine/ds_config.py).
- Activations of a layer are those of a Llama-like block: two norms in float32, attention without stored scores unless
  it is `eager`, an MLP, gated unless its tensors' names are those of a plain one. With gradient checkpointing each
  layer keeps its input (selective: and the results of its matrix products and attention), and one layer is whole.
- DeepSpeed allocates a bucket of `reduce_bucket_size` gradients whole, and joins what is in it once more. On a CPU only
  the pages that gradients reach are taken.
- Libraries of a process take CONTEXT_BYTES of a GPU (CUDA's context, NCCL, cuBLAS) and PROCESS_BYTES of the host.
- Holes that the allocator leaves are not in it: leave a tenth of the device free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ddk_ds.config import Config, Model
from ddk_ds.config.sections import Teacher
from ddk_ds.engine.ds_config import bucket_sizes
from ddk_ds.engine.model_files import COMPUTE_BYTES, ModelShape
from ddk_ds.kernels.options import GROUP_CHUNKS, default_chunk_tokens

CONTEXT_BYTES = 1_500_000_000
PROCESS_BYTES = 800_000_000
# float32 master weight and AdamW's two moments; the float32 gradient that micro-batches add up in.
OPTIMIZER_BYTES, GRADIENT_BYTES = 12, 4
# Of a memory's size, what may be planned with: the rest is for the allocator's holes and the estimate's errors.
MEMORY_MARGIN = 0.9

# DeepSpeed's defaults for what a configuration leaves out, in elements.
_DEFAULTS = {
    "param_persistence_threshold": 100_000,
    "max_live_parameters": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}
# Buffers that DeepSpeed pins for what rests on nvme: 5 of 1e8 elements of parameters, 4 sub-groups of the optimizer.
_NVME_PARAMETERS, _NVME_SUB_GROUPS = 500_000_000, 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank takes, by part."""

    resident: dict[str, int]
    """On the device from the start to the end."""
    passes: dict[str, int]
    """On the device at the height of a micro-batch's forward and backward."""
    update: dict[str, int]
    """On the device while the optimizer steps, when nothing of `passes` is there."""
    host: dict[str, int]
    """In the host's memory."""

    @property
    def parts(self) -> dict[str, int]:
        """Every part; those of `passes` and `update` are never there together."""
        return {**self.resident, **self.passes, **self.update, **self.host}

    @property
    def device_bytes(self) -> int:
        """Most that the rank takes of its device at a time."""
        return sum(self.resident.values()) + max(sum(self.passes.values()), sum(self.update.values()))

    @property
    def host_bytes(self) -> int:
        """Most that the rank takes of the host's memory at a time, beside a CPU that is its device."""
        return sum(self.host.values())

    @property
    def total(self) -> int:
        """Both: what counts where the device is the host's CPU."""
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
    """Memory of one of `world_size` ranks. A node holds as many times the host's bytes as it has ranks.

    `ranks_per_node` None: all of them are on one node.
    """
    raw = config.deepspeed.get("zero_optimization", {})  # of the student's engine; the teacher's has the defaults
    ours = {name.removeprefix("stage3_"): size for name, size in bucket_sizes(student.largest_layer).items()}
    defaults = {**_DEFAULTS, **ours}
    zero = {name: int(raw.get(f"stage3_{name}", raw.get(name, default))) for name, default in defaults.items()}
    compute = COMPUTE_BYTES[config.train.precision]
    if teacher is not None and config.teacher is not None:
        teacher = teacher.as_sharded(config.teacher, config.train.precision)
    shard = student.shard(world_size)
    resident: dict[str, int] = {"CUDA context and NCCL": CONTEXT_BYTES if device_type == "cuda" else 0}
    host = {"process": PROCESS_BYTES}
    weights: dict[str, tuple[Model, ModelShape]] = {"student shards": (config.student, student)}
    if teacher is not None and config.teacher is not None:
        weights["teacher shards"] = (config.teacher, teacher)
    for name, (model, shape) in weights.items():
        place = {"none": resident, "cpu": host, "nvme": {}}[model.offload_params]
        place[name] = compute * shape.shard(shard_ranks(model, world_size, ranks_per_node))
        if model.offload_params == "nvme":
            host[f"{name}: nvme buffers"] = compute * _NVME_PARAMETERS
    optimizer = {"none": resident, "cpu": host, "nvme": {}}[config.optimizer.offload]
    optimizer["master weights and moments"] = OPTIMIZER_BYTES * shard
    (resident if config.optimizer.offload == "none" else host)["gradient sums"] = GRADIENT_BYTES * shard
    sub_group = min(shard, zero["sub_group_size"])
    if config.optimizer.offload == "nvme":
        host["optimizer: nvme buffers"] = 4 * _NVME_SUB_GROUPS * sub_group
    if config.checkpoint.in_background:
        host["checkpoint's copy"] = (OPTIMIZER_BYTES + compute) * shard
    bucket = (
        zero["reduce_bucket_size"] if device_type == "cuda" else min(zero["reduce_bucket_size"], student.parameters)
    )
    resident["gradient bucket"] = compute * bucket
    small = sum(size for size in student.tensors if size <= zero["param_persistence_threshold"])
    resident["small parameters"] = compute * small
    # The gradients of a sub-group as one float32 tensor, and one of AdamW's own intermediate results.
    update = {"gradient and intermediate of the update": 2 * 4 * sub_group}
    if config.optimizer.offload != "none":
        host |= update
        update = {}
    together = 1  # micro-batches of a pass of the teacher
    if config.teacher is not None:
        micro_batches = config.train.global_batch_samples // (config.train.micro_batch_samples * world_size)
        together = max(1, min(config.teacher.per_pass, micro_batches))
    passes = _passes(config, student, teacher, vocab_size, zero, device_type, together)
    return MemoryEstimate(resident, passes, update, host)


def fewest_passes(config: Config, micro_batches: int, fits: Callable[[Config], bool]) -> Config:
    """The configuration with as few passes of the teacher over a step's `micro_batches` as fit, of equal numbers; where
    nothing fits, one micro-batch a pass."""
    for passes in range(1, micro_batches):
        tried = _with_passes(config, math.ceil(micro_batches / passes))
        if fits(tried):
            return tried
    return _with_passes(config, 1)


def _with_passes(config: Config, count: int) -> Config:
    assert config.teacher is not None, "asked for the passes of a teacher that is not there"
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"micro_batches_per_pass": count})})


def shard_ranks(model: Model, world_size: int, ranks_per_node: int | None) -> int:
    """Ranks that hold one copy of a model's weights between them."""
    within = model.shard_within if isinstance(model, Teacher) else "world"
    return {"world": world_size, "node": min(ranks_per_node or world_size, world_size), "gpu": 1}[within]


def _passes(
    config: Config,
    student: ModelShape,
    teacher: ModelShape | None,
    vocab_size: int,
    zero: dict[str, int],
    device_type: str,
    together: int,
) -> dict[str, int]:
    """Parts of a micro-batch's forward and backward; the teacher's passes take `together` micro-batches."""
    compute = COMPUTE_BYTES[config.train.precision]
    tokens = config.train.micro_batch_samples * config.data.sequence_length
    largest = max(student.largest_layer, student.head)
    live = min(student.parameters, max(zero["max_live_parameters"], largest) + zero["prefetch_bucket_size"])
    chunk = min(tokens, config.loss.chunk_tokens or default_chunk_tokens(vocab_size, device_type))
    logits = 4 if config.loss.logits_dtype == "float32" else compute
    models = 1 if teacher is None else 2
    parts = {
        "student gathered": compute * live,
        "gradients of a layer": compute * largest,
        "gradients joined for the reduction": compute
        * min(max(zero["reduce_bucket_size"], student.head), student.parameters),
        # A float32 sum and the same rounded to the parameter's dtype.
        "head's weight gradient": (4 + compute) * student.head,
        "hidden states": tokens
        * (student.hidden * (compute + 4) + (together * teacher.hidden * compute if teacher else 0)),
        "logits of a chunk": chunk * vocab_size * logits * models,
        "activations": _activations(config, student, tokens, compute),
    }
    if compute == 2:
        parts["logits' gradients"] = min(tokens, GROUP_CHUNKS * chunk) * vocab_size * compute
    if teacher is not None and config.teacher is not None:
        prefetch = bucket_sizes(teacher.largest_layer)["stage3_prefetch_bucket_size"]
        layer = _layer_activations(config.teacher, teacher, tokens, config.data.sequence_length, compute)
        gathered = compute * min(teacher.parameters, max(teacher.largest_layer, teacher.head) + prefetch)
        # Into a layer and out of it go all micro-batches of a pass, through it one at a time.
        layer += 2 * (together - 1) * tokens * teacher.hidden * compute
        # Its layers are gone when its head is gathered, and its activations when the student's begin.
        parts["teacher gathered"] = max(gathered, compute * teacher.head)
        parts["activations"] = max(parts["activations"], layer)
    return parts


def _activations(config: Config, shape: ModelShape, tokens: int, compute: int) -> int:
    layer = _layer_activations(config.student, shape, tokens, config.data.sequence_length, compute)
    # Gradients on their way back through an MLP, beside what it keeps.
    passing = 2 * tokens * shape.intermediate * compute
    kept = {
        False: layer,
        True: tokens * shape.hidden * compute,
        "selective": tokens * (_products(shape) * compute + 4 * shape.heads),
    }[config.student.gradient_checkpointing]
    # What is computed again is there for one layer at a time.
    return shape.layers * kept + (layer if config.student.gradient_checkpointing else 0) + passing


def _products(shape: ModelShape) -> int:
    """Elements by token of a layer's matrix products and of its attention, and the layer's input."""
    attention = 2 * shape.attention + 2 * shape.key_value
    return attention + 3 * shape.hidden + (2 if shape.gated else 1) * shape.intermediate


def _layer_activations(model: Model, shape: ModelShape, tokens: int, length: int, compute: int) -> int:
    """Bytes that a layer keeps for its backward."""
    norms = 2 * shape.hidden * (4 + 2 * compute)
    # Only flash_attention_2 takes grouped keys and values as they are; for others transformers repeats them. (One head
    # of them is not repeated but viewed.)
    repeated = model.attn_implementation != "flash_attention_2" and shape.key_value > shape.attention // shape.heads
    attention = compute * (2 * shape.attention + 2 * (shape.attention if repeated else shape.key_value))
    if model.attn_implementation == "eager":
        attention += shape.heads * length * (4 + 2 * compute)  # scores, their softmax in float32, the same rounded
    return tokens * (norms + attention + compute * (4 if shape.gated else 2) * shape.intermediate)
