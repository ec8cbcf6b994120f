"""Clear errors for arguments of the distillation head that do not fit, without waiting for a device.

`ddk_ds::linear_kd`: the loop over chunks as one operator with its derivative, opaque to torch.compile.

It keeps gradients for the backward pass, never a weight: ZeRO-3 may free that.

The head's public functions: the distillation loss, the per-token NLL, and a teacher's top k.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddk_ds.errors import ConfigError
from ddk_ds.kernels.chunked import Call, Head, compute_dtype, logits_dtype, run_chunks, triton_scaled
from ddk_ds.kernels.options import KDLoss, Options, TeacherTopK, default_chunk_tokens
from ddk_ds.kernels.rows_eager import apply_form
from ddk_ds.kernels.rows_native import scaled_half

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HeadTensors = tuple[Tensor | None, Tensor | None, Tensor | None]  # hidden, weight, bias


def check_call(
    student: HeadTensors,
    teacher: HeadTensors,
    topk: TeacherTopK | None,
    labels: Tensor,
    num_valid: Tensor,
    valid_rows: Tensor | None,
    weight_grad_buffer: Tensor | None,
    options: Options,
) -> None:
    """Raise ConfigError naming the first argument of `linear_kd_loss` that is wrong, and its value."""
    options.check()
    hidden, weight, bias = student
    assert hidden is not None and weight is not None, "the student's tensors are required"
    check_head("student", hidden, weight, bias, options.vocab_size)
    check_labels(labels, hidden)
    if num_valid.numel() != 1 or num_valid.device != hidden.device:
        raise ConfigError(
            f"num_valid has shape {tuple(num_valid.shape)} on {num_valid.device}: give a scalar tensor on "
            f"{hidden.device}"
        )
    _check_teacher(teacher, topk, hidden, options)
    if valid_rows is not None and (valid_rows.dtype != torch.int64 or valid_rows.dim() != 1):
        raise ConfigError(f"valid_rows is {valid_rows.dtype} {tuple(valid_rows.shape)}: give int64 (m,)")
    if weight_grad_buffer is not None and (
        weight_grad_buffer.shape != weight.shape or weight_grad_buffer.dtype != torch.float32
    ):
        raise ConfigError(
            f"weight_grad_buffer is {weight_grad_buffer.dtype} {tuple(weight_grad_buffer.shape)}: "
            f"give float32 {tuple(weight.shape)}"
        )


def _check_teacher(teacher: HeadTensors, topk: TeacherTopK | None, student_hidden: Tensor, options: Options) -> None:
    hidden, weight, bias = teacher
    if (hidden is None) != (weight is None):
        raise ConfigError("teacher_hidden, teacher_weight: one is None; give both, or neither for CE alone")
    if hidden is not None and topk is not None:
        raise ConfigError("teacher_topk is given beside teacher_hidden: give one of them")
    if hidden is not None and weight is not None:
        check_head("teacher", hidden, weight, bias, options.vocab_size)
        _check_same_tokens("teacher_hidden", hidden, student_hidden)
    if topk is not None:
        check_top_k(topk.ids.shape[-1], options.vocab_size)
        _check_same_tokens("teacher_topk.ids", topk.ids, student_hidden)
        if topk.ids.shape != topk.log_probs.shape or topk.ids.dtype != torch.int64:
            raise ConfigError(
                f"teacher_topk has ids {topk.ids.dtype} {tuple(topk.ids.shape)} and log_probs "
                f"{tuple(topk.log_probs.shape)}: give int64 (n, k) and (n, k)"
            )


def check_head(who: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int) -> None:
    """Hidden states (n, H), weight (V, H) and bias (V,) of one model; `who` is the prefix of their names."""
    prefix = f"{who}_" if who else ""
    for name, tensor in ((f"{prefix}hidden", hidden), (f"{prefix}weight", weight)):
        if tensor.dim() != 2:
            raise ConfigError(f"{name} has shape {tuple(tensor.shape)}: it must have two axes")
        if tensor.dtype not in _FLOATS:
            raise ConfigError(f"{name} has dtype {tensor.dtype}: it must be float64, float32, bfloat16 or float16")
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ConfigError(
            f"{prefix}hidden is {hidden.dtype} on {hidden.device}, "
            f"{prefix}weight {weight.dtype} on {weight.device}: both must have the same dtype and device"
        )
    if hidden.shape[1] != weight.shape[1]:
        raise ConfigError(
            f"{prefix}hidden has shape {tuple(hidden.shape)}, {prefix}weight {tuple(weight.shape)}: "
            "their second axes must be the same hidden size"
        )
    if not 1 <= vocab_size <= len(weight):
        raise ConfigError(
            f"vocab_size is {vocab_size}, {prefix}weight has {len(weight)} rows: "
            "vocab_size must be between 1 and the rows of the head"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ConfigError(f"{prefix}bias has shape {tuple(bias.shape)}: it must be ({len(weight)},)")


def check_labels(labels: Tensor, hidden: Tensor) -> None:
    """Dtype, shape and device; the values are checked on the device."""
    if labels.dtype != torch.int64 or labels.shape != hidden.shape[:1] or labels.device != hidden.device:
        raise ConfigError(
            f"labels are {labels.dtype} {tuple(labels.shape)} on {labels.device}: "
            f"they must be int64 ({len(hidden)},) on {hidden.device}"
        )


def check_top_k(k: int, vocab_size: int) -> None:
    """Number of a teacher's tokens that are kept."""
    if not 1 <= k <= vocab_size:
        raise ConfigError(f"k is {k}: give 1 to vocab_size, {vocab_size}")


def _check_same_tokens(name: str, tensor: Tensor, student_hidden: Tensor) -> None:
    if len(tensor) != len(student_hidden) or tensor.device != student_hidden.device:
        raise ConfigError(
            f"{name} has {len(tensor)} rows on {tensor.device}, "
            f"student_hidden {len(student_hidden)} on {student_hidden.device}: give both for the same tokens"
        )


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


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    *,
    num_valid: Tensor,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_topk: TeacherTopK | None = None,
    valid_rows: Tensor | None = None,
    weight_grad_buffer: Tensor | None = None,
    per_token: bool = False,
    **options: Any,
) -> KDLoss:
    """loss = ce_weight * CE + gamma * T^2 * D(teacher, student), from hidden states (Eq. 3 of arXiv 2407.16154).

    Gradients of the student's tensors that require one are computed in the call; the teacher gets none. With gamma 0,
    or without a teacher, it costs what the CE alone costs. It never waits for a GPU.

    Args:
        student_hidden, teacher_hidden: (n, Hs), (n, Ht). float64 inputs compute in float64, others in float32.
        student_weight, teacher_weight: (Vs, Hs), (Vt, Ht), at least vocab_size rows each.
        labels: (n,) int64 in [0, vocab_size), or ignore_index. Ignored rows may hold anything, NaN too.
        num_valid: scalar tensor on the same device, divides the sums (0 counts as 1); it may be that of a whole step.
        student_bias, teacher_bias: (Vs,), (Vt,).
        teacher_topk: instead of teacher_hidden and teacher_weight; see `top_k_of`.
        valid_rows: (m,) int64, the rows that are not ignored: other rows are left out before the matmuls.
        weight_grad_buffer: (Vs, Hs) float32; the backward pass adds the weight's gradient to it and returns none.
        per_token: give token_ce and token_kl.
        options: the fields of `Options`; vocab_size and gamma are required.

    Raises:
        ConfigError: a shape, dtype, device or option is wrong. A label outside the vocabulary is a RuntimeError, on a
            GPU a device assertion.
    """
    chosen = _options(options, student_hidden)
    student = (student_hidden, student_weight, student_bias)
    teacher = (teacher_hidden, teacher_weight, teacher_bias)
    check_call(student, teacher, teacher_topk, labels, num_valid, valid_rows, weight_grad_buffer, chosen)
    compared = [*teacher, *(teacher_topk or (None, None))]
    # Under gamma 0 the teacher is not touched; inside the operator a leaf is not known any more.
    compared = [None if t is None or chosen.gamma == 0 else t.detach() for t in compared]
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in student]
    total, ce, kl, _, _, _, token_ce, token_kl = linear_kd(
        *student, *compared, labels, valid_rows, weight_grad_buffer, needs, *chosen.pack()
    )
    inverse = torch.where(num_valid > 0, num_valid, 1).reshape(()).double().reciprocal()
    dtype = compute_dtype(student_hidden)
    parts = (ce, kl, token_ce, token_kl) if per_token else (ce, kl)
    return KDLoss((total * inverse).to(dtype), *((part.detach() * inverse).to(dtype) for part in parts))


@torch.no_grad()
def linear_nll(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, **options: Any) -> Tensor:
    """Negative log likelihood of each token in nats, from hidden states, without a gradient.

    Args: as in `linear_kd_loss`; hidden (n, H), weight (V, H), labels (n,), bias (V,). options: vocab_size,
        ignore_index, chunk_tokens, logits_dtype, student_form, engine.

    Returns:
        (n,) float32, 0 where the label is ignore_index.

    Raises:
        ConfigError: a shape, dtype, device or option is wrong.
    """
    chosen = _options({"gamma": 0.0, **options}, hidden)
    chosen.check()
    check_head("", hidden, weight, bias, chosen.vocab_size)
    check_labels(labels, hidden)
    call = Call(hidden, weight, bias, None, None, None, None, labels, None, (False, False, False))
    return run_chunks(call, chosen).token_ce.float()


@torch.no_grad()
def top_k_of(
    hidden: Tensor, weight: Tensor, k: int, *, temperature: float = 1.0, bias: Tensor | None = None, **options: Any
) -> TeacherTopK:
    """The k likeliest tokens of each row and their log-probabilities at `temperature`, for `linear_kd_loss`.

    Args: as in `linear_nll`, without labels; options: vocab_size, chunk_tokens, teacher_form.

    Returns:
        ids (n, k) int64 and log_probs (n, k) float32.

    Raises:
        ConfigError: a shape, dtype or option is wrong, or k is not in 1..vocab_size.
    """
    chosen = _options({"gamma": 0.0, "temperature": temperature, **options}, hidden)
    chosen.check()
    check_head("teacher", hidden, weight, bias, chosen.vocab_size)
    check_top_k(k, chosen.vocab_size)
    head = Head(weight, bias, chosen.vocab_size, logits_dtype(hidden, chosen))
    ids, log_probs = [], []
    for part in hidden.detach().split(chosen.chunk_tokens):
        raw = part.new_empty(len(part), chosen.vocab_size, dtype=head.logits_dtype)
        head.logits(part, raw)
        logits = apply_form(raw, chosen.teacher_form)[0] / temperature
        top = logits.topk(k, dim=-1)
        ids.append(top.indices)
        log_probs.append((top.values - logits.logsumexp(-1, keepdim=True)).float())
    return TeacherTopK(torch.cat(ids), torch.cat(log_probs))


def _options(given: dict[str, Any], hidden: Tensor) -> Options:
    """`given` as Options with the chunk size resolved; an unknown name is a TypeError."""
    options = Options(**given)
    if options.chunk_tokens == 0:
        return replace(options, chunk_tokens=default_chunk_tokens(max(1, options.vocab_size), hidden.device.type))
    return options
