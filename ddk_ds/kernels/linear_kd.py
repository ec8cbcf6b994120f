"""The head's public functions: the distillation loss, the per-token NLL, and a teacher's top k."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddk_ds.kernels import checks
from ddk_ds.kernels.chunked import Call, compute_dtype, logits_dtype, run_chunks
from ddk_ds.kernels.heads import Head
from ddk_ds.kernels.operator import linear_kd
from ddk_ds.kernels.options import KDLoss, Options, TeacherTopK, default_chunk_tokens
from ddk_ds.kernels.rows_eager import apply_form


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
    checks.check_call(student, teacher, teacher_topk, labels, num_valid, valid_rows, weight_grad_buffer, chosen)
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
    checks.check_head("", hidden, weight, bias, chosen.vocab_size)
    checks.check_labels(labels, hidden)
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
    checks.check_head("teacher", hidden, weight, bias, chosen.vocab_size)
    checks.check_top_k(k, chosen.vocab_size)
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
