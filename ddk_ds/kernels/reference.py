"""The truth that tests and benchmarks share: Eq. 3 on full float64 logits, differentiated by autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class KDLoss(NamedTuple):
    """A distillation loss and its parts, each a scalar: sums over valid tokens divided by `num_valid`.

    `loss = ce + gamma * T^2 * kl`. `loss` is differentiable; `ce` and `kl` (the plain KL at temperature T,
    in nats, without T^2) are detached.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor


def reference_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int) -> Tensor:
    """Float64 logits (n, vocab_size) of `hidden` (n, H) under the head `weight` (V, H), `bias` (V,)."""
    bias64 = None if bias is None else bias[:vocab_size].double()
    return functional.linear(hidden.double(), weight[:vocab_size].double(), bias64)


def reference_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    ignore_index: int = -100,
    bias: Tensor | None = None,
) -> Tensor:
    """Per-token negative log likelihood (n,) in float64, 0 where the label is ignored."""
    logits = reference_logits(hidden, weight, bias, vocab_size)
    return functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")


def reference_kd_loss(
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
) -> KDLoss:
    """Eq. 3 of arXiv 2407.16154 with the T^2 convention, from all logits at once in float64.

    Same arguments and meaning as `linear_kd.linear_kd_loss`; differentiable in the student's tensors.
    """
    count = torch.where(num_valid > 0, num_valid, torch.ones_like(num_valid)).double()
    valid = labels != ignore_index
    # Not masked rows but absent rows: whatever an ignored row holds, it is no part of this computation.
    student = reference_logits(student_hidden[valid], student_weight, student_bias, vocab_size)
    ce = functional.cross_entropy(student, labels[valid], reduction="sum") / count
    kl = torch.zeros_like(ce)
    if gamma != 0 and teacher_hidden is not None and teacher_weight is not None:
        with torch.no_grad():
            teacher = reference_logits(teacher_hidden[valid], teacher_weight, teacher_bias, vocab_size)
        log_p = functional.log_softmax(student / temperature, dim=-1)
        log_q = functional.log_softmax(teacher / temperature, dim=-1)
        kl = (log_q.exp() * (log_q - log_p)).sum() / count
    return KDLoss(ce + gamma * temperature**2 * kl, ce.detach(), kl.detach())
