"""The head's two public functions, the distillation loss and the per-token NLL, with their checks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddk_ds.errors import ConfigError
from ddk_ds.kernels.chunked import Head, LinearKD, Options, compute_dtype, softmax_rows
from ddk_ds.kernels.reference import KDLoss

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    *,
    gamma: float,
    temperature: float = 1.0,
    vocab_size: int,
    ignore_index: int = -100,
    num_valid: Tensor,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_tokens: int = 256,
) -> KDLoss:
    """Eq. 3 of arXiv 2407.16154: loss = CE + gamma * T^2 * KL(teacher_T || student_T), from hidden states.

    Never holds the logits of more than `chunk_tokens` tokens. Gradients (of the student's tensors that require one)
    are computed in the call. With gamma 0 or no teacher it costs what the CE alone costs and kl is 0.

    Args:
        student_hidden: (n, Hs). Sets the compute dtype: float64 for float64, else float32.
        student_weight: (Vs, Hs), Vs >= vocab_size; dtype of student_hidden.
        teacher_hidden: (n, Ht), or None with teacher_weight None. No gradient.
        teacher_weight: (Vt, Ht), Vt >= vocab_size. No gradient.
        labels: (n,) int64 in [0, vocab_size), or ignore_index. Ignored rows may hold anything, NaN too.
        gamma: weight of the KL term, >= 0.
        temperature: T > 0; T^2 keeps the KL's gradient scale (Hinton et al. 2015).
        vocab_size: tokens of the tokenizer; rows of the heads above it are padding and take no part.
        num_valid: scalar tensor on the same device, what the sums are divided by (0 counts as 1); it may be
            the count of the whole optimizer step.
        student_bias, teacher_bias: (Vs,), (Vt,).
        chunk_tokens: tokens a chunk; memory is 2 * chunk_tokens * vocab_size elements and a little.

    Returns:
        KDLoss in the compute dtype; kl is without T^2.

    Raises:
        ConfigError: a shape, dtype, device or option is wrong.
    """
    _check_head("student", student_hidden, student_weight, student_bias, vocab_size)
    _check_labels(labels, student_hidden, chunk_tokens)
    _check_scalars(gamma, temperature, num_valid, student_hidden.device)
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ConfigError("teacher_hidden, teacher_weight: one is None; give both, or neither for CE alone")
    if teacher_hidden is not None and teacher_weight is not None:
        _check_head("teacher", teacher_hidden, teacher_weight, teacher_bias, vocab_size)
        _check_same_tokens(teacher_hidden, student_hidden)
    # Inside the autograd function neither is known any more.
    needs = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (student_hidden, student_weight, student_bias)
    )
    options = Options(float(gamma), float(temperature), vocab_size, ignore_index, chunk_tokens)
    teacher = [None if t is None else t.detach() for t in (teacher_hidden, teacher_weight, teacher_bias)]
    outputs = LinearKD.apply(
        student_hidden, student_weight, student_bias, *teacher, labels, num_valid.reshape(()), options, needs
    )
    return KDLoss(*outputs)


@torch.no_grad()
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    ignore_index: int = -100,
    bias: Tensor | None = None,
    chunk_tokens: int = 256,
) -> Tensor:
    """Negative log likelihood of each token in nats, from hidden states, without a gradient.

    Args: as in `linear_kd_loss`; hidden (n, H), weight (V, H), labels (n,), bias (V,).

    Returns:
        (n,) float32, 0 where the label is ignore_index.

    Raises:
        ConfigError: a shape, dtype, device or option is wrong.
    """
    _check_head("", hidden, weight, bias, vocab_size)
    _check_labels(labels, hidden, chunk_tokens)
    head = Head(weight, bias, vocab_size, compute_dtype(hidden))
    valid = labels != ignore_index
    targets = torch.where(valid, labels, 0)
    buffer = hidden.new_empty(2, min(chunk_tokens, len(labels)), vocab_size, dtype=head.dtype)
    nll = hidden.new_zeros(len(labels), dtype=torch.float32)
    for start in range(0, len(labels), chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, len(labels)))
        logits, probs = buffer[:, : rows.stop - start]
        head.logits(hidden[rows], logits)
        nll[rows] = softmax_rows(logits, probs) - logits.gather(1, targets[rows, None]).squeeze(1)
    return nll.masked_fill_(~valid, 0)


def _check_head(who: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int) -> None:
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


def _check_labels(labels: Tensor, hidden: Tensor, chunk_tokens: int) -> None:
    if labels.dtype != torch.int64 or labels.shape != hidden.shape[:1] or labels.device != hidden.device:
        raise ConfigError(
            f"labels are {labels.dtype} {tuple(labels.shape)} on {labels.device}: "
            f"they must be int64 ({len(hidden)},) on {hidden.device}"
        )
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens is {chunk_tokens}: give 1 or more")


def _check_scalars(gamma: float, temperature: float, num_valid: Tensor, device: torch.device) -> None:
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ConfigError(f"gamma is {gamma}: give a finite number >= 0")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature is {temperature}: give a finite number > 0")
    if num_valid.numel() != 1 or num_valid.device != device:
        raise ConfigError(
            f"num_valid has shape {tuple(num_valid.shape)} on {num_valid.device}: give a scalar tensor on {device}"
        )


def _check_same_tokens(teacher_hidden: Tensor, student_hidden: Tensor) -> None:
    if len(teacher_hidden) != len(student_hidden) or teacher_hidden.device != student_hidden.device:
        raise ConfigError(
            f"teacher_hidden has {len(teacher_hidden)} rows on {teacher_hidden.device}, "
            f"student_hidden {len(student_hidden)} on {student_hidden.device}: give both for the same tokens"
        )
