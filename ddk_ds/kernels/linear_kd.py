"""The head's public functions: the distillation loss, the loss of each token, and a teacher's top k.

Arguments that do not fit are a ConfigError that names them; none of the checks waits for a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ddk_ds.errors import ConfigError
from ddk_ds.kernels.chunked import (
    Call,
    Head,
    HeadInput,
    Wanted,
    compute_dtype,
    logits_dtype,
    row_buffer,
    run_chunks,
)
from ddk_ds.kernels.custom_op import linear_kd_sums
from ddk_ds.kernels.options import ALIGN, KDLoss, LabelLogProbs, Options, TeacherTopK, default_chunk_tokens
from ddk_ds.kernels.rows_eager import apply_form, rows_at_once

LOWEST = -1e30  # 0 times it is 0
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    *,
    num_valid: Tensor,
    options: Options,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_topk: TeacherTopK | None = None,
    valid_rows: Tensor | None = None,
    row_weights: Tensor | None = None,
    weight_grad_buffer: Tensor | None = None,
    per_token: bool = False,
) -> KDLoss:
    """Compute ce_weight * CE + gamma * T^2 * D(teacher, student) from hidden states (Eq. 3 of arXiv 2407.16154).

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
        row_weights: (n,) factors of the rows' losses in sums and gradients; `num_valid` divides as without them.
        weight_grad_buffer: (Vs, Hs) float32; the backward pass adds the weight's gradient to it and returns none.
        per_token: return token_ce and token_kl too, without weights; otherwise they are None.

    Raises:
        ConfigError: a shape, dtype, device or option is wrong. A label outside the vocabulary is a RuntimeError, on a
            GPU a device assertion.
    """
    options = _with_chunk_tokens(options, student_hidden)
    student = HeadInput(student_hidden, student_weight, student_bias)
    teacher = _teacher_given(teacher_hidden, teacher_weight, teacher_bias, teacher_topk)
    _check_call(student, teacher, labels, num_valid, valid_rows, weight_grad_buffer, options)
    # Decided here because inside the operator no tensor requires a gradient.
    wanted = Wanted(*(torch.is_grad_enabled() and x is not None and x.requires_grad for x in student))
    dtype = compute_dtype(student_hidden)
    weights = None if row_weights is None else _checked_weights(row_weights, student_hidden).to(dtype)
    call = Call(student, teacher if options.gamma else None, labels, valid_rows, wanted, weights)
    sums = linear_kd_sums(call, weight_grad_buffer, options)
    inverse = torch.where(num_valid > 0, num_valid, 1).reshape(()).double().reciprocal()
    parts = (sums.ce, sums.kl, sums.token_ce, sums.token_kl) if per_token else (sums.ce, sums.kl)
    return KDLoss((sums.total * inverse).to(dtype), *((part.detach() * inverse).to(dtype) for part in parts))


@torch.no_grad()
def linear_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, options: Options, bias: Tensor | None = None
) -> Tensor:
    """Compute the negative log likelihood of each label in nats, from hidden states, without a gradient.

    Args: as in `linear_kd_loss`; hidden (n, H), weight (V, H), labels (n,), bias (V,). The options of the
        divergence and the teacher have no effect.

    Returns:
        (n,) float32, 0 where the label is ignore_index.

    Raises:
        ConfigError: a shape, dtype, device or option is wrong.
    """
    options = _with_chunk_tokens(replace(options, ce_weight=1.0), hidden)
    options.check()
    student = HeadInput(hidden, weight, bias)
    check_head("", student, options.vocab_size)
    _check_labels(labels, hidden)
    return run_chunks(Call(student, None, labels), options).token_ce.float()


@torch.no_grad()
def top_k_of(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    options: Options,
    bias: Tensor | None = None,
    of_labels: LabelLogProbs | None = None,
) -> TeacherTopK:
    """Find the k likeliest tokens of each row and their log-probabilities, to be the teacher of `linear_kd_loss`.

    Args: hidden (n, H), weight (V, H) and bias (V,) are the teacher's. Only the options vocab_size,
        temperature, chunk_tokens, logits_dtype and teacher_form have an effect. `of_labels` (n,) is filled.

    Returns:
        ids (n, k) int64; log_probs (n, k) and log_tail (n,) float32.

    Raises:
        ConfigError: a shape, dtype or option is wrong, or k is not in 1..vocab_size.
    """
    _check_top_k(k, options.vocab_size)
    parts = []
    for logits, log_norm in teacher_logits(HeadInput(hidden, weight, bias), options, of_labels):
        top = _largest(logits, k)
        # No other logit is above the smallest of these, so the exponentials' sum keeps its digits.
        least = top.values[:, -1:].clamp_min(LOWEST / 2)
        others = logits.scatter_(1, top.indices, -torch.inf).sub_(least).exp_().sum(-1, keepdim=True)
        log_tail = least + others.log()
        log_norm.copy_(torch.cat([top.values, log_tail], 1).logsumexp(-1))
        log_probs, log_tail = (part - log_norm[:, None] for part in (top.values, log_tail))
        parts.append((top.indices, log_probs.float(), log_tail.squeeze(1).float()))
    return TeacherTopK(*map(torch.cat, zip(*parts, strict=True)))


class _Largest(NamedTuple):
    values: Tensor
    indices: Tensor


def _largest(logits: Tensor, k: int) -> _Largest:
    """Return the k largest of each row (m, W), in descending order: they lie in the k blocks with the largest maxima.

    A CPU's topk compares pairs of number and index, which takes longer than all other passes over a row.
    """
    blocks = logits.unflatten(1, (-1, ALIGN))
    if k >= blocks.shape[1]:
        return _Largest(*logits.topk(k))
    chosen = blocks.amax(-1).topk(k, sorted=False).indices
    values, places = blocks.gather(1, chosen[..., None].expand(-1, -1, ALIGN)).flatten(1).topk(k)
    return _Largest(values, chosen.gather(1, places // ALIGN) * ALIGN + places % ALIGN)


def teacher_logits(
    teacher: HeadInput, options: Options, of_labels: LabelLogProbs | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a teacher's logits at the temperature, (m, W) for some of its tokens, with LOWEST as padding.

    The second tensor, (m,), is the caller's to write: the log of the sum of the logits' exponentials, from which
    `of_labels` (n,) is filled. Both may be changed. Raises ConfigError if a tensor or an option is wrong.
    """
    hidden, weight, bias = teacher
    options = _with_chunk_tokens(options, hidden)
    options.check()
    check_head("teacher", teacher, options.vocab_size)
    head = Head(weight, bias, options.vocab_size, logits_dtype(hidden, options))
    products = row_buffer("teacher", options.chunk_tokens, options.vocab_size, head.logits_dtype, hidden)
    done = 0
    for part in hidden.detach().split(options.chunk_tokens):
        head.logits(part, products[: len(part)])
        for block in products[: len(part)].split(rows_at_once(hidden.device, products.shape[1])):
            logits = apply_form(block, options.teacher_form)[0]
            logits[:, options.vocab_size :] = LOWEST
            rows, log_norm = slice(done, done + len(logits)), logits.new_empty(len(logits))
            done = rows.stop
            labels = None if of_labels is None else of_labels.labels[rows]
            at_label = None if labels is None else logits.gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
            of_one = log_norm
            if options.temperature != 1:
                of_one = logits.logsumexp(-1)
                logits.div_(options.temperature)
            yield logits, log_norm
            if of_labels is not None and labels is not None and at_label is not None:
                of_labels.log_probs[rows] = (at_label - of_one).masked_fill_(labels < 0, 0)


def _with_chunk_tokens(options: Options, hidden: Tensor) -> Options:
    """Return the options with `default_chunk_tokens` in place of a `chunk_tokens` of 0."""
    if options.chunk_tokens:
        return options
    return replace(options, chunk_tokens=default_chunk_tokens(max(1, options.vocab_size), hidden.device.type))


def _teacher_given(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, topk: TeacherTopK | None
) -> HeadInput | TeacherTopK | None:
    """Return the teacher's tensors, detached; None without a teacher.

    Raises:
        ConfigError: hidden states come without a weight or the reverse, or together with a top k.
    """
    if (hidden is None) != (weight is None):
        raise ConfigError("teacher_hidden, teacher_weight: one is None; give both, or neither for CE alone")
    if hidden is not None and topk is not None:
        raise ConfigError("teacher_topk is given beside teacher_hidden: give one of them")
    if topk is not None:
        return TeacherTopK(*(tensor.detach() for tensor in topk))
    if hidden is None or weight is None:
        return None
    return HeadInput(hidden.detach(), weight.detach(), None if bias is None else bias.detach())


def _check_call(
    student: HeadInput,
    teacher: HeadInput | TeacherTopK | None,
    labels: Tensor,
    num_valid: Tensor,
    valid_rows: Tensor | None,
    weight_grad_buffer: Tensor | None,
    options: Options,
) -> None:
    """Raise ConfigError naming the first argument of `linear_kd_loss` that is wrong, and its value."""
    options.check()
    hidden, weight, _ = student
    check_head("student", student, options.vocab_size)
    _check_labels(labels, hidden)
    if num_valid.numel() != 1 or num_valid.device != hidden.device:
        raise ConfigError(
            f"num_valid has shape {tuple(num_valid.shape)} on {num_valid.device}: give a scalar tensor on "
            f"{hidden.device}"
        )
    if isinstance(teacher, HeadInput):
        check_head("teacher", teacher, options.vocab_size)
        _check_same_tokens("teacher_hidden", teacher.hidden, hidden)
    elif teacher is not None:
        _check_teacher_topk(teacher, hidden)
    if valid_rows is not None and (valid_rows.dtype != torch.int64 or valid_rows.dim() != 1):
        raise ConfigError(f"valid_rows is {valid_rows.dtype} {tuple(valid_rows.shape)}: give int64 (m,)")
    if weight_grad_buffer is not None and (
        weight_grad_buffer.shape != weight.shape or weight_grad_buffer.dtype != torch.float32
    ):
        raise ConfigError(
            f"weight_grad_buffer is {weight_grad_buffer.dtype} {tuple(weight_grad_buffer.shape)}: "
            f"give float32 {tuple(weight.shape)}"
        )


def _check_teacher_topk(topk: TeacherTopK, student_hidden: Tensor) -> None:
    _check_same_tokens("teacher_topk.ids", topk.ids, student_hidden)
    shapes = (topk.ids.shape, topk.log_probs.shape, (*topk.log_tail.shape, topk.ids.shape[-1]))
    if len(set(map(tuple, shapes))) > 1 or not topk.ids.shape[-1] or topk.ids.dtype != torch.int64:
        raise ConfigError(
            f"teacher_topk has ids {topk.ids.dtype} {tuple(topk.ids.shape)}, log_probs {tuple(topk.log_probs.shape)} "
            f"and log_tail {tuple(topk.log_tail.shape)}: give int64 (n, k), (n, k) and (n,)"
        )


def check_head(model: str, tensors: HeadInput, vocab_size: int) -> None:
    """Raise ConfigError if the tensors of one model do not fit together or to `vocab_size`.

    The message names them with `model` as prefix, for example teacher_hidden; "" is no prefix.
    """
    prefix = f"{model}_" if model else ""
    hidden, weight, bias = tensors
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


def _check_labels(labels: Tensor, hidden: Tensor) -> None:
    """Raise ConfigError unless the labels are int64 (n,) on the device of `hidden`; `run_chunks` checks the values."""
    if labels.dtype != torch.int64 or labels.shape != hidden.shape[:1] or labels.device != hidden.device:
        raise ConfigError(
            f"labels are {labels.dtype} {tuple(labels.shape)} on {labels.device}: "
            f"they must be int64 ({len(hidden)},) on {hidden.device}"
        )


def _checked_weights(weights: Tensor, hidden: Tensor) -> Tensor:
    if weights.shape != hidden.shape[:1] or weights.device != hidden.device or not weights.is_floating_point():
        raise ConfigError(
            f"row_weights are {weights.dtype} {tuple(weights.shape)} on {weights.device}: give floats ({len(hidden)},) "
            f"on {hidden.device}"
        )
    return weights.detach()


def _check_top_k(k: int, vocab_size: int) -> None:
    if not 1 <= k <= vocab_size:
        raise ConfigError(f"k is {k}: give 1 to vocab_size, {vocab_size}")


def _check_same_tokens(name: str, tensor: Tensor, student_hidden: Tensor) -> None:
    if len(tensor) != len(student_hidden) or tensor.device != student_hidden.device:
        raise ConfigError(
            f"{name} has {len(tensor)} rows on {tensor.device}, "
            f"student_hidden {len(student_hidden)} on {student_hidden.device}: give both for the same tokens"
        )
