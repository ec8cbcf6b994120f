"""Divergences between teacher q and student p over one row of logits: the formulas that every row kernel shares.

With r = log q - log p, b the weight of q in the mixture m = b q + (1 - b) p, and z the student's logits over the
temperature:

    forward_kl        KL(q || p)                                      Hinton et al. 2015; Eq. 3 of arXiv 2407.16154
    reverse_kl        KL(p || q)                                      MiniLLM, arXiv 2306.08543
    jensen_shannon    b KL(q || m) + (1 - b) KL(p || m), b = coefficient           GKD, arXiv 2306.13649
    skew_forward_kl   KL(q || a q + (1 - a) p), a = coefficient                    DistiLLM, arXiv 2402.03898
    skew_reverse_kl   KL(p || a p + (1 - a) q), a = coefficient                    DistiLLM, arXiv 2402.03898
    total_variation   sum |q - p| / 2                                 f-distill, arXiv 2307.15190

Near the end of a distillation q is close to p, a divergence of 1e-4 is a sum of terms of 1e-2, and each naive formula
loses its digits to cancellation. So every value adds a term whose sum over the row is 0 and which makes each summand of
second order and not negative (for KL: p - q); where |r| is small, p - q and that summand come from r and not from the
two rounded probabilities; every log of a mixture comes from expm1(-|r|), whatever r; and r comes from the difference
of the logits, never from two rounded log-probabilities. Gradients are p * (h - sum p h) with h the
derivative by p up to a constant that makes it small near the teacher (for the forward KL p - q).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Divergence = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl", "total_variation"
]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
# Numbers of the divergences in the compiled kernels, in which 0 is none.
KIND = {name: number for number, name in enumerate(DIVERGENCES, 1)}
WITH_COEFFICIENT = ("jensen_shannon", "skew_forward_kl", "skew_reverse_kl")


def teacher_weight(divergence: Divergence, coefficient: float) -> float:
    """Return b, the teacher's weight in the mixture m."""
    return 1.0 - coefficient if divergence == "skew_reverse_kl" else coefficient


def divergence_terms(
    divergence: Divergence, q: Tensor, p: Tensor, log_ratio: Tensor, b: float
) -> tuple[Tensor, Tensor]:
    """Return terms (m, V) whose row sums are the divergences, and their gradient (m, V) by the student's logits / T.

    q, p (m, V) are the probabilities of teacher and student, log_ratio is log q - log p, and b is `teacher_weight`.
    """
    close = log_ratio.abs() < 0.35
    difference = torch.where(close, q * torch.expm1(-log_ratio), p - q)  # p - q
    if divergence == "forward_kl":
        return torch.where(close, q * (torch.expm1(-log_ratio) + log_ratio), q * log_ratio + difference), difference
    if divergence == "reverse_kl":
        value = torch.where(close, p * (torch.expm1(log_ratio) - log_ratio), -difference - p * log_ratio)
        h = -log_ratio
    elif divergence == "total_variation":
        value, h = 0.5 * difference.abs(), -0.5 * log_ratio.sign()
    else:
        value, h = _mixture_terms(divergence, q, p, log_ratio, difference, b)
    return value, p * (h - (p * h).sum(-1, keepdim=True))


def _mixture_terms(
    divergence: Divergence, q: Tensor, p: Tensor, r: Tensor, difference: Tensor, b: float
) -> tuple[Tensor, Tensor]:
    teacher_leads = r >= 0
    weight = torch.full_like(r, b).masked_fill_(teacher_leads, 1 - b)
    log_larger = -torch.log1p(weight * torch.expm1(-r.abs()))
    log_q_m = torch.where(teacher_leads, log_larger, log_larger + r)  # log(q / m)
    log_p_m = torch.where(teacher_leads, log_larger - r, log_larger)
    if divergence == "jensen_shannon":
        return b * q * log_q_m + (1 - b) * p * log_p_m, (1 - b) * log_p_m
    if divergence == "skew_forward_kl":
        return q * log_q_m + (1 - b) * difference, -(1 - b) * torch.expm1(log_q_m)
    return p * log_p_m - b * difference, log_p_m - (1 - b) * torch.expm1(log_p_m)
