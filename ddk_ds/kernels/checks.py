"""Clear errors for arguments of the distillation head that do not fit, without waiting for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from ddk_ds.errors import ConfigError
from ddk_ds.kernels.options import Options, TeacherTopK

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
