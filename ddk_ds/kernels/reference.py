"""The loss by its definition, on full float64 logits and by autograd: the truth for tests and benchmarks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ddk_ds.kernels.options import KDLoss, LogitForm, Options, TeacherTopK


def reference_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocab_size: int,
    form: LogitForm = LogitForm(),  # noqa: B008
) -> Tensor:
    """Compute float64 logits (n, vocab_size) of `hidden` (n, H) under the head `weight` (V, H), `bias` (V,)."""
    bias64 = None if bias is None else bias[:vocab_size].double()
    logits = functional.linear(hidden.double(), weight[:vocab_size].double(), bias64) * form.scale
    return form.softcap * torch.tanh(logits / form.softcap) if form.softcap else logits


def reference_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    ignore_index: int = -100,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute the negative log likelihood (n,) of each label in float64, 0 where it is ignored."""
    logits = reference_logits(hidden, weight, bias, vocab_size)
    return functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")


def reference_kd_loss(
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
) -> KDLoss:
    """Compute the result of `linear_kd_loss` from all logits at once, in float64 and by autograd.

    The loss is differentiable in the student's tensors. `token_ce` and `token_kl` are always returned.
    """
    size = options.vocab_size
    count = torch.where(num_valid > 0, num_valid, torch.ones_like(num_valid)).double()
    valid = labels != options.ignore_index
    # Ignored rows are left out, not masked: whatever they hold is no part of this computation.
    student = reference_logits(student_hidden[valid], student_weight, student_bias, size, options.student_form)
    token_ce = student.new_zeros(len(student))
    if options.ce_weight:
        token_ce = functional.cross_entropy(student, labels[valid], reduction="none")
    token_kl = torch.zeros_like(token_ce)
    log_p = functional.log_softmax(student / options.temperature, dim=-1)
    log_q = None
    if options.gamma and teacher_topk is not None:
        log_q, log_p = _buckets(TeacherTopK(*(t[valid] for t in teacher_topk)), log_p)
    elif options.gamma and teacher_hidden is not None and teacher_weight is not None:
        with torch.no_grad():
            teacher = reference_logits(teacher_hidden[valid], teacher_weight, teacher_bias, size, options.teacher_form)
            log_q = functional.log_softmax(teacher / options.temperature, dim=-1)
    if log_q is not None:
        token_kl = _definition(options, log_q, log_p)
    ce, kl = token_ce.sum() / count, token_kl.sum() / count
    by_token = [student.new_zeros(len(labels)).masked_scatter(valid, t.detach() / count) for t in (token_ce, token_kl)]
    return KDLoss(options.ce_weight * ce + options.kd_weight * kl, ce.detach(), kl.detach(), *by_token)


def _definition(options: Options, log_q: Tensor, log_p: Tensor) -> Tensor:
    """Compute the divergence (n,) from log-probabilities (n, V) by the formula of its paper."""

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        # a log a is 0 at a = 0; its derivative has no such place: the student's logits are finite.
        return torch.where(log_a == -math.inf, 0.0, log_a.exp() * (log_a - log_b)).sum(-1)

    def mixture(weight_of_q: float) -> Tensor:
        return torch.logaddexp(log_q + math.log(weight_of_q), log_p + math.log1p(-weight_of_q))

    c = options.coefficient
    if options.divergence == "forward_kl":
        return kl(log_q, log_p)
    if options.divergence == "reverse_kl":
        return kl(log_p, log_q)
    if options.divergence == "jensen_shannon":
        return c * kl(log_q, mixture(c)) + (1 - c) * kl(log_p, mixture(c))
    if options.divergence == "skew_forward_kl":
        return kl(log_q, mixture(c))
    if options.divergence == "skew_reverse_kl":
        return kl(log_p, mixture(1 - c))
    return 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1)


def _buckets(topk: TeacherTopK, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (n, k + 1) of teacher and student: the k tokens, and all other tokens together.

    The teacher's are normalised: they come rounded to float32. Both are 0 in place of a token that there is not.
    """
    log_q, none, ids = topk.log_probs.double(), topk.ids < 0, topk.ids.clamp_min(0)
    known = torch.zeros_like(log_p, dtype=torch.int64).scatter_add_(1, ids, (~none).long()) > 0
    others = log_p.masked_fill(known, -math.inf).logsumexp(-1, keepdim=True)
    buckets = torch.cat([log_q, topk.log_tail.double()[:, None]], -1)
    found = log_p.gather(1, ids).masked_fill(none, -math.inf)
    return buckets.log_softmax(-1), torch.cat([found, others], -1)
