"""Seconds that a GPU computes a forward pass: matmuls, the kernels between them, and weights in 8 bits. Pure.

The share of the peak in gpus.py was measured with MPT's layers, whose norms are one kernel each and whose MLPs have no
gate: for such layers nothing is added. A layer of Llama's kind in transformers has many small kernels. Counted by hand
in its code (transformers 5.24, bf16), they move beyond what one kernel for each norm with its residual, for the rotary
positions, and for the gate moves, in bytes an element:

- 34 for each of two norms with the residual before it: 42 in seven kernels, float32 in between, instead of 8;
- 16 for the rotary positions of queries and keys: 20 in five kernels instead of 4;
- 36 more for queries and keys with norms of their own, in six kernels that the rotary positions' then contains;
- 4 for the gate, whose product is 10 in two kernels instead of 6.

A backward pass has 2.7 times as many. `compile_layers` makes one kernel of each group. With these bytes the step of
plain torch that an H100 was measured with (docs/results/gpu_suite_h100.json) is simulated within 1 %, without them 27 %
too fast (docs/planning.md). That compiled layers reach MPT's share is an assumption: no GPU has measured them.

Weights in 8 bits are converted back for each micro-batch by kernels that read 1 byte and write 2 (experts: scaled by
another, which reads and writes 2). Where inputs are rounded too, the products have the peak of their format, at the
same share of it, which no GPU has shown. `ROUNDED_BYTES` and `SUMS_BYTES` count the kernels around them.
"""

from __future__ import annotations

from ddk_ds.config import Model
from ddk_ds.config.sections import Teacher
from ddk_ds.engine.model_files import ModelShape
from ddk_ds.planner.gpus import MEMORY_EFFICIENCY, Gpu
from ddk_ds.planner.plan_inputs import PlannedModel

NORM_BYTES, ROTARY_BYTES, HEAD_NORM_BYTES, GATE_BYTES = 34, 16, 36, 4
SMALL_BACKWARD = 2.7
"""Bytes of a backward pass's small kernels beyond fused ones, in those of a forward pass."""
ROUNDED_BYTES = {"fp8": {True: 5, False: 13}, "int8_dynamic": {True: 5, False: 29}}
"""Bytes moved for each input of a product that is rounded to 8 bits, by `teacher.compile_layers`.

Compiled: read for the largest of a row and read again, 2 each, and written, 1. Else quotients are written in float32
and read again, and those of int8 rounded and clamped in place before.
"""
SUMS_BYTES = {"int8": {True: 4, False: 4}, "int8_dynamic": {True: 8, False: 24}}
"""Bytes moved for each result of a product, beyond the 2 that a matmul writes, by `teacher.compile_layers`.

int8: read and written once more with the scale. int8_dynamic: int32 sums are written and read, and scaled by token and
row; without compiling in float32, in three kernels.
"""
CONVERTED_BYTES, CONVERTED_EXPERT_BYTES = 3, 7
"""Bytes moved to convert a weight of 8 bits to bf16."""


def unfused_bytes(shape: ModelShape) -> int:
    """Return the bytes that the small kernels of a layer that is not compiled move for each token beyond fused ones."""
    if not shape.gated:
        return 0
    heads = shape.attention + shape.key_value
    rotary = ROTARY_BYTES + (HEAD_NORM_BYTES if shape.normed_heads else 0)
    return 2 * NORM_BYTES * shape.hidden + rotary * heads + GATE_BYTES * shape.intermediate


def between_matmuls_s(model: PlannedModel, section: Model, gpu: Gpu) -> float:
    """Return the seconds of a token's small kernels in a forward pass of layers that are not compiled; else 0."""
    if section.compile_layers:
        return 0.0
    return model.shape.layers * unfused_bytes(model.shape) / (gpu.hbm_bytes_per_s * MEMORY_EFFICIENCY)


def token_s(model: PlannedModel, section: Model, precision: str, gpu: Gpu) -> float:
    """Return the seconds of a token's forward pass: its matmuls and all that is computed between them."""
    flop_per_s, bytes_per_s = gpu.peak_flop_per_s * gpu.compute_efficiency, gpu.hbm_bytes_per_s * MEMORY_EFFICIENCY
    seconds = model.forward_flops / flop_per_s + between_matmuls_s(model, section, gpu)
    if not isinstance(section, Teacher) or section.quantize == "none":
        return seconds
    matrices = [matrix for matrix in model.shape.quantized(section, precision) if not matrix.expert]
    rounded, sums = (table.get(section.quantize, {}) for table in (ROUNDED_BYTES, SUMS_BYTES))
    inputs, outputs = (sum(matrix.shape[axis] for matrix in matrices) for axis in (1, 0))
    compiled = section.compile_layers
    seconds += (inputs * rounded.get(compiled, 0) + outputs * sums.get(compiled, 0)) / bytes_per_s
    peak = gpu.peak_in_8_bits(section.quantize)
    if peak is not None:
        flops = 2.0 * sum(matrix.elements for matrix in matrices)
        seconds += flops / (peak * gpu.compute_efficiency) - flops / flop_per_s
    return seconds


def conversion_s(model: PlannedModel, section: Model, precision: str, gpu: Gpu) -> float:
    """Return the seconds in which a pass over one micro-batch converts weights of 8 bits back; 0 if there are none."""
    if not isinstance(section, Teacher):
        return 0.0
    multiplied = model.shape.multiplied_in_8_bits(section, precision)
    converted = (matrix for matrix in model.shape.quantized(section, precision) if matrix not in multiplied)
    moved = sum(m.elements * (CONVERTED_EXPERT_BYTES if m.expert else CONVERTED_BYTES) for m in converted)
    return moved / (gpu.hbm_bytes_per_s * MEMORY_EFFICIENCY)
