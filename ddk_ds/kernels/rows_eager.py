"""The element-wise part of the distillation head in plain torch: any device, any divergence, top-k teachers.

It runs where neither a C++ compiler nor Triton is available; the compiled row kernels are tested against it and
against the float64 reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddk_ds.kernels.divergences import divergence_terms, teacher_weight
from ddk_ds.kernels.options import LogitForm, Options, Rows, TeacherTopK

# Elements of a block of rows: a MiB or two on a CPU, so that passes hit the cache; on a GPU enough to fill it.
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 23}


def eager_rows(tensors: Rows, options: Options) -> None:
    """Fill `ce`, `divergence` and `grad` (unless it is None) of `tensors`, one row for each token.

    The gradient is that of the loss with respect to the student's logits before their `LogitForm`.
    """
    student, teacher, labels, ce, divergence, grad = tensors
    classes = options.vocab_size
    step = rows_at_once(student.device, classes)
    for start in range(0, len(student), step):
        rows = slice(start, start + step)
        part = TeacherTopK(*(t[rows] for t in teacher)) if isinstance(teacher, TeacherTopK) else teacher
        part = part[rows, :classes] if isinstance(part, Tensor) else part
        block_ce, block_divergence, block_grad = _block(student[rows, :classes], part, labels[rows], options)
        ignored = labels[rows] < 0
        ce[rows] = block_ce.masked_fill(ignored, 0)
        divergence[rows] = block_divergence.masked_fill(ignored, 0)
        if grad is not None:
            grad[rows, :classes] = block_grad.masked_fill_(ignored[:, None], 0).to(grad.dtype)
            grad[rows, classes:] = 0


def rows_at_once(device: torch.device, width: int) -> int:
    """Return the number of rows of this width that passes over the elements take at a time."""
    return max(1, _BLOCK_ELEMENTS.get(device.type, 1 << 23) // width)


def _block(
    student: Tensor, teacher: Tensor | TeacherTopK | None, labels: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    logits, slope = apply_form(student, options.student_form)
    targets = labels.clamp_min(0)[:, None]
    grad = torch.zeros_like(logits)
    ce = divergence = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    if options.ce_weight != 0:
        probs, norm = softmax_rows(logits)
        ce = norm - logits.gather(1, targets).squeeze(1)
        grad = probs.scatter_add_(1, targets, -torch.ones_like(probs[:, :1])).mul_(options.ce_weight)
    if teacher is not None:
        if isinstance(teacher, TeacherTopK):
            terms, kd_grad = _topk_terms(logits / options.temperature, teacher, options)
        else:
            terms, kd_grad = _full_terms(logits, apply_form(teacher, options.teacher_form)[0], options)
        divergence = terms.sum(-1).double()
        grad.add_(kd_grad, alpha=options.kd_weight / options.temperature)
    return ce, divergence, grad if slope is None else grad.mul_(slope)


def apply_form(raw: Tensor, form: LogitForm) -> tuple[Tensor, Tensor | None]:
    """Return the logits (m, V), and their derivative with respect to `raw` (m, V), the products of the head.

    The derivative is None for a plain form, (1, 1) for a scale alone, and (m, V) for a softcap. Half-precision inputs
    become float32.
    """
    logits = raw if raw.dtype == torch.float64 else raw.float()
    if form == LogitForm():
        return logits, None
    if form.softcap == 0:
        return logits * form.scale, torch.full_like(logits[:1, :1], form.scale)
    bend = torch.tanh(logits * (form.scale / form.softcap))
    return bend * form.softcap, (1 - bend * bend) * form.scale


def softmax_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax (m, V) of each row, and L (m,) in float64 with softmax = exp(logits - L).

    L = (largest logit) - log(largest probability). It therefore contains the rounding error of the sum in the softmax,
    which a logsumexp computed separately would not.
    """
    probs = torch.softmax(logits, -1)
    return probs, logits.amax(-1).double() - probs.amax(-1).double().log()


def _full_terms(student: Tensor, teacher: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    inverse = 1 / options.temperature
    q, teacher_norm = softmax_rows(teacher * inverse)
    p, student_norm = softmax_rows(student * inverse)
    # The logits are subtracted before the row's constant is added: near the teacher that difference is exact.
    log_ratio = (teacher - student).mul_(inverse).add_((student_norm - teacher_norm).to(student.dtype)[:, None])
    b = teacher_weight(options.divergence, options.coefficient)
    return divergence_terms(options.divergence, q, p, log_ratio, b)


def _topk_terms(scaled: Tensor, teacher: TeacherTopK, options: Options) -> tuple[Tensor, Tensor]:
    """Return the divergence's terms (m, k + 1), and its gradient (m, V) with respect to `scaled`.

    `scaled` (m, V) are the student's logits / T. A term belongs to one of the k tokens, the last to the tail, which is
    all other tokens together. The tail's gradient is divided between its tokens by their probabilities.
    """
    none, lowest = teacher.ids < 0, torch.finfo(scaled.dtype).min
    ids = torch.where(none, teacher.ids[:, :1], teacher.ids).clamp_min(0)  # a token that is there already
    tail = log_sum_of_others(scaled, ids)
    found = scaled.gather(1, ids).masked_fill(none, lowest)
    log_p = torch.cat([found, tail], 1) - scaled.logsumexp(-1, keepdim=True)
    log_q = torch.cat([teacher.log_probs, teacher.log_tail[:, None]], 1).to(scaled.dtype)
    # q log q is 0 at q = 0, and nan by -inf. Rounded to float32 the probabilities sum to nearly 1: to 1 here.
    log_q, log_p = log_q.clamp_min(lowest).log_softmax(-1).clamp_min(lowest), log_p.clamp_min(lowest)
    b = teacher_weight(options.divergence, options.coefficient)
    terms, bucket_grad = divergence_terms(options.divergence, log_q.exp(), log_p.exp(), log_q - log_p, b)
    # By the tokens' shares of the tail, not of the whole row: there they can underflow together.
    grad = (scaled - tail).exp_().mul_(bucket_grad[:, -1:]).scatter_(1, ids, 0)
    return terms, grad.scatter_add_(1, ids, bucket_grad[:, :-1])


def log_sum_of_others(logits: Tensor, ids: Tensor) -> Tensor:
    """Return log(sum of exp(logits)) over the tokens that are not in `ids`, (m, 1); -inf where all are in it."""
    return logits.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
