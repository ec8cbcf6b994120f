"""`ddk_ds::linear_kd`: the loop over chunks as one operator with its derivative, opaque to torch.compile.

It keeps gradients for the backward pass, never a weight: ZeRO-3 may free that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddk_ds.kernels.chunked import Call, compute_dtype, run_chunks, triton_scaled
from ddk_ds.kernels.options import Options, TeacherTopK
from ddk_ds.kernels.rows_native import scaled_half

_SCHEMA = (
    "(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden,"
    " Tensor? teacher_weight, Tensor? teacher_bias, Tensor? topk_ids, Tensor? topk_log_probs, Tensor labels,"
    " Tensor? valid_rows, Tensor? weight_grad_buffer, bool[] needs, float[] numbers, int[] sizes, str[] names)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BUFFER = 10  # place of weight_grad_buffer
_GRADS = slice(3, 6)  # places of the gradients among the outputs
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("ddk_ds::linear_kd", mutates_args=(), schema=_SCHEMA)
def linear_kd(*arguments: Any) -> Outputs:
    """Sums of `chunked.run_chunks`; a gradient that is not wanted is an empty tensor."""
    topk = None if arguments[6] is None else TeacherTopK(arguments[6], arguments[7])
    student_and_teacher, (labels, valid_rows, _, needs, *packed) = arguments[:6], arguments[8:]
    call = Call(*student_and_teacher, topk, labels, valid_rows, tuple(needs))  # type: ignore[call-arg]
    sums = run_chunks(call, Options.unpack(*packed))
    empty = call.student_hidden.new_empty(0)
    return tuple(empty.clone() if output is None else output for output in sums)  # type: ignore[return-value]


@linear_kd.register_fake
def _shapes(*arguments: Any) -> Outputs:
    hidden, weight, needs = arguments[0], arguments[1], arguments[11]
    dtype = compute_dtype(hidden)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    scalars = [hidden.new_empty((), dtype=torch.float64) for _ in range(3)]
    grads = [
        hidden.new_empty(shape, dtype=dtype) if need else hidden.new_empty(0)
        for shape, need in zip(shapes, needs, strict=True)
    ]
    tokens = [hidden.new_empty(len(hidden), dtype=torch.float64) for _ in range(2)]
    return (*scalars, *grads, *tokens)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.set_materialize_grads(False)  # zeros for outputs that nobody differentiates would be as large as the weight
    ctx.save_for_backward(*output[_GRADS])
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.buffer = inputs[_BUFFER]
    ctx.needs = inputs[11]


def _backward(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None, None, None]
    if grad_total is not None:
        for i, (grad, need, dtype) in enumerate(zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=True)):
            if not need:
                continue
            if i == 1 and ctx.buffer is not None:
                ctx.buffer.addcmul_(grad, grad_total.to(grad.dtype))
            else:
                grads[i] = _scaled(grad, grad_total, dtype)
    return (*grads, *(None,) * 12)


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    scale = scale.to(grad.dtype)
    if dtype != grad.dtype:
        return scaled(grad, scale, dtype)
    # The sum becomes the gradient itself unless another backward pass may come for it.
    keep = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
    return grad * scale if keep else grad.mul_(scale)


@torch.library.custom_op("ddk_ds::scaled", mutates_args=())
def scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * scale, rounded to `dtype`, in one pass where there is a kernel for it: the weight's gradient is large."""
    if grad.is_cuda and triton_scaled is not None and grad.dtype == torch.float32:
        return triton_scaled(grad, scale, dtype)
    rounded = scaled_half(grad, scale) if dtype == torch.bfloat16 else None
    return (grad * scale).to(dtype) if rounded is None else rounded


@scaled.register_fake
def _scaled_shape(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(grad, dtype=dtype)


linear_kd.register_autograd(_backward, setup_context=_setup)
