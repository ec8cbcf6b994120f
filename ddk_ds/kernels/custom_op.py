"""The loop over chunks as one operator with a derivative, `ddk_ds::linear_kd`, which torch.compile does not look into.

The backward pass needs the gradients that the forward pass has computed, and no weight: ZeRO-3 may have freed that.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ddk_ds.kernels.chunked import Call, HeadInput, Sums, Wanted, compute_dtype, run_chunks, triton_scaled
from ddk_ds.kernels.divergences import Divergence
from ddk_ds.kernels.options import Engine, LogitForm, LogitsDtype, Options, TeacherTopK
from ddk_ds.kernels.rows_native import scaled_half

# The fields of `Sums`, with an empty tensor for each gradient that is not wanted.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def linear_kd_sums(call: Call, weight_grad_buffer: Tensor | None, options: Options) -> Sums:
    """Return the sums of `chunked.run_chunks`; `total` is differentiable in the student's tensors.

    The backward pass adds the weight's gradient to `weight_grad_buffer` (V, H) float32 where that is given.
    """
    teacher = topk = None
    if isinstance(call.teacher, TeacherTopK):
        topk = call.teacher
    else:
        teacher = call.teacher
    outputs = linear_kd(
        *call.student,
        weight_grad_buffer,
        *(teacher or (None, None, None)),
        *(topk or (None, None, None)),
        call.labels,
        call.valid_rows,
        call.row_weights,
        wanted=list(call.wanted),
        **vars(options),
    )
    return Sums(*outputs)


@torch.library.custom_op("ddk_ds::linear_kd", mutates_args=())
def linear_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    weight_grad_buffer: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    topk_ids: Tensor | None,
    topk_log_probs: Tensor | None,
    topk_log_tail: Tensor | None,
    labels: Tensor,
    valid_rows: Tensor | None,
    row_weights: Tensor | None,
    *,
    wanted: list[bool],
    vocab_size: int,
    gamma: float,
    temperature: float,
    divergence: str,
    coefficient: float,
    ce_weight: float,
    scale_by_temperature: bool,
    ignore_index: int,
    chunk_tokens: int,
    logits_dtype: str,
    student_form: list[float],
    teacher_form: list[float],
    engine: str,
) -> Outputs:
    """Return the sums of `run_chunks`.

    An operator takes no objects, so the arguments are the fields of `Call` and `Options`.
    """
    options = Options(
        vocab_size=vocab_size,
        gamma=gamma,
        temperature=temperature,
        divergence=cast(Divergence, divergence),
        coefficient=coefficient,
        ce_weight=ce_weight,
        scale_by_temperature=scale_by_temperature,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens,
        logits_dtype=cast(LogitsDtype, logits_dtype),
        student_form=LogitForm(*student_form),
        teacher_form=LogitForm(*teacher_form),
        engine=cast(Engine, engine),
    )
    student = HeadInput(student_hidden, student_weight, student_bias)
    teacher: HeadInput | TeacherTopK | None = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = HeadInput(teacher_hidden, teacher_weight, teacher_bias)
    elif topk_ids is not None and topk_log_probs is not None and topk_log_tail is not None:
        teacher = TeacherTopK(topk_ids, topk_log_probs, topk_log_tail)
    sums = run_chunks(Call(student, teacher, labels, valid_rows, Wanted(*wanted), row_weights), options)
    return tuple(student_hidden.new_empty(0) if x is None else x for x in sums)  # type: ignore[return-value]


@linear_kd.register_fake
def _shapes(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, *_: Any, wanted: list[bool], **__: Any
) -> Outputs:
    hidden = student_hidden
    total, ce, kl = (hidden.new_empty((), dtype=torch.float64) for _ in range(3))
    hidden_grad, weight_grad, bias_grad = (
        hidden.new_empty(shape, dtype=compute_dtype(hidden)) if want else hidden.new_empty(0)
        for shape, want in zip((hidden.shape, student_weight.shape, student_weight.shape[:1]), wanted, strict=True)
    )
    token_ce, token_kl = (hidden.new_empty(len(hidden), dtype=torch.float64) for _ in range(2))
    return total, ce, kl, hidden_grad, weight_grad, bias_grad, token_ce, token_kl


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Outputs) -> None:
    student_hidden, student_weight, student_bias, weight_grad_buffer, *_ = inputs
    sums = Sums(*output)
    ctx.set_materialize_grads(False)  # zeros for outputs that nobody differentiates would be as large as the weight
    ctx.save_for_backward(sums.hidden_grad, sums.weight_grad, sums.bias_grad)
    ctx.wanted = Wanted(*keyword_only_inputs["wanted"])
    ctx.dtypes = [None if x is None else x.dtype for x in (student_hidden, student_weight, student_bias)]
    ctx.weight_grad_buffer = weight_grad_buffer


def _backward(ctx: Any, total_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    hidden_grad = weight_grad = bias_grad = None
    if total_grad is not None:
        hidden_sum, weight_sum, bias_sum = ctx.saved_tensors
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if ctx.wanted.hidden:
            hidden_grad = _scaled(hidden_sum, total_grad, hidden_dtype)
        if ctx.wanted.weight and ctx.weight_grad_buffer is not None:
            ctx.weight_grad_buffer.addcmul_(weight_sum, total_grad.to(weight_sum.dtype))
        elif ctx.wanted.weight:
            weight_grad = _scaled(weight_sum, total_grad, weight_dtype)
        if ctx.wanted.bias:
            bias_grad = _scaled(bias_sum, total_grad, bias_dtype)
    student = (hidden_grad, weight_grad, bias_grad)
    return *student, *(None for _ in ctx.needs_input_grad[len(student) :])


linear_kd.register_autograd(_backward, setup_context=_save)


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    scale = scale.to(grad.dtype)
    if dtype != grad.dtype:
        return scaled(grad, scale, dtype)
    # The sum becomes the gradient itself unless another backward pass may come for it.
    keep = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
    return grad * scale if keep else grad.mul_(scale)


@torch.library.custom_op("ddk_ds::scaled", mutates_args=())
def scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad * scale rounded to `dtype`, in one pass where a kernel exists: the weight's gradient is large."""
    if grad.is_cuda and triton_scaled is not None and grad.dtype == torch.float32:
        return triton_scaled(grad, scale, dtype)
    rounded = scaled_half(grad, scale) if dtype == torch.bfloat16 else None
    return (grad * scale).to(dtype) if rounded is None else rounded


@scaled.register_fake
def _scaled_shape(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(grad, dtype=dtype)
