"""The element-wise part on a GPU where the teacher is known by a few tokens: it reads the student's logits alone.

A row's known tokens are taken out of it first (they are LOW then), so that the others' sum, the tail, keeps its digits
where both models are sure of the known ones. The first pass sums the others, the second writes their gradients, and the
known tokens' gradients are written over the second's. With a half-precision gradient that is 10 bytes an element, of
which cross-entropy alone takes as many. The formulas are those of divergences.py for the forward KL.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ddk_ds.kernels.options import ALIGN, Options, Rows, TeacherTopK
from ddk_ds.kernels.rows_triton import (
    BLOCK,
    LOW,
    NUM_WARPS,
    _element,
    _log_of,
    _logits,
    _lower_padding,
    _online,
    _skip_row,
    _slope,
    form_number,
)


@triton.jit
def _take(
    S, ids, there, V, W, s_scale, s_cap, S_FORM: tl.constexpr, KNOWN: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """Return a row's known logits, and leave LOW in their places and in the row's padding."""
    x = _logits(S + ids, there, s_scale, s_cap, S_FORM)
    tl.debug_barrier()  # all have read the logits that now change
    tl.store(S + ids, tl.full([KNOWN], LOW, dtype=tl.float32).to(S.dtype.element_ty), mask=there)
    _lower_padding(S, V, W, ALIGN)
    tl.debug_barrier()
    return x


@triton.jit
def _with_known(top, total, x, there):
    """Return maximum and sum of exp(x - maximum) of a row, from those of its other tokens and its known logits x."""
    new = tl.maximum(top, tl.max(tl.where(there, x, LOW), 0))
    known = tl.sum(tl.where(there, tl.exp(x - new), 0.0), 0)
    return new, total * tl.exp(top - new) + known


@triton.jit
def _log_probs(LOG_Q, log_tail, there, K, KNOWN: tl.constexpr):
    """Return the log-probabilities of a row's known tokens and of its tail, which sum to 1; very low for 0."""
    at = tl.arange(0, KNOWN)
    log_q = tl.maximum(tl.load(LOG_Q + at, mask=there, other=LOW), -1.0e4)
    log_tail = tl.maximum(log_tail, -1.0e4)
    top = tl.maximum(log_tail, tl.max(log_q, 0))
    total = tl.sum(tl.where(there, tl.exp(log_q - top), 0.0), 0) + tl.exp(log_tail - top)
    norm = top + _log_of(total, total - 1.0)
    return log_q - norm, log_tail - norm


@triton.jit
def _bucket(log_q, log_p):
    """Return p - q of a token or of the tail, and its summand of the divergence."""
    value, difference = _element(tl.exp(log_q), tl.exp(log_p), log_q - log_p, 0.0, 1)
    return difference, value


@triton.jit
def _tail(
    S, W, inv_t, s_scale, s_cap,
    ONE_SOFTMAX: tl.constexpr, WITH_CE: tl.constexpr, S_FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read the row once and return two pairs (maximum, sum of exp(x - maximum)) of the tokens that are not known.

    x are the logits (for the CE) and the logits / T. A pair that the flags exclude is (LOW, 0); with ONE_SOFTMAX the
    second pair is the first.
    """
    h_top = LOW
    h_sum = 0.0
    s_top = LOW
    s_sum = 0.0
    for start in range(0, W, BLOCK):
        at = start + tl.arange(0, BLOCK)
        s = _logits(S + at, at < W, s_scale, s_cap, S_FORM)
        if WITH_CE or ONE_SOFTMAX:
            h_top, h_sum = _online(s, h_top, h_sum)
        if not ONE_SOFTMAX:
            s_top, s_sum = _online(s * inv_t, s_top, s_sum)
    if ONE_SOFTMAX:
        s_top = h_top
        s_sum = h_sum
    return h_top, h_sum, s_top, s_sum


@triton.jit(do_not_specialize=["V", "K"])
def known_row_kernel(
    S, G, Y, CE, D, IDS, LOG_Q, LOG_TAIL, s_stride, g_stride, V, W, K,
    ce_weight, kd_weight, inv_t, s_scale, s_cap,
    ONE_SOFTMAX: tl.constexpr, WITH_CE: tl.constexpr, WRITE: tl.constexpr, S_FORM: tl.constexpr,
    KNOWN: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(Y + row)
    S += row * s_stride
    G += row * g_stride
    if label < 0:
        _skip_row(G, CE + row, D + row, W, WRITE, BLOCK)
        return
    at_label = _logits(S + label, label < V, s_scale, s_cap, S_FORM)
    place = tl.arange(0, KNOWN)
    ids = tl.load(IDS + row * K + place, mask=place < K, other=-1)
    there = ids >= 0
    x = _take(S, ids, there, V, W, s_scale, s_cap, S_FORM, KNOWN, ALIGN)
    h_top, h_sum, s_top, s_sum = _tail(S, W, inv_t, s_scale, s_cap, ONE_SOFTMAX, WITH_CE, S_FORM, BLOCK)
    top, total = _with_known(s_top, s_sum, x * inv_t, there)
    log_total = _log_of(total, total - 1.0)
    ce = 0.0
    hard_top = top
    hard_total = total
    if WITH_CE:
        if not ONE_SOFTMAX:
            hard_top, hard_total = _with_known(h_top, h_sum, x, there)
        ce = (hard_top - at_label) + _log_of(hard_total, hard_total - 1.0)
    tl.store(CE + row, ce)
    log_q, log_q_tail = _log_probs(LOG_Q + row * K, tl.load(LOG_TAIL + row), there, K, KNOWN)
    log_p = (x * inv_t - top) - log_total
    log_p_tail = tl.maximum((s_top - top) + _log_of(s_sum, s_sum - 1.0) - log_total, -1.0e4)
    difference, value = _bucket(log_q, log_p)
    tail_difference, tail_value = _bucket(log_q_tail, log_p_tail)
    tl.store(D + row, tl.sum(tl.where(there, value, 0.0), 0) + tail_value)
    if WRITE:
        # A token of the tail takes its share of it: in the whole row they can underflow together.
        kd = kd_weight * tail_difference / s_sum
        hard = ce_weight * tl.exp(h_top - hard_top) / hard_total
        if ONE_SOFTMAX and WITH_CE:
            kd += hard
        for start in range(0, W, BLOCK):
            at = start + tl.arange(0, BLOCK)
            s = _logits(S + at, at < W, s_scale, s_cap, S_FORM)
            grad = tl.exp(s * inv_t - s_top) * kd
            if WITH_CE and not ONE_SOFTMAX:
                grad += tl.exp(s - h_top) * hard
            if WITH_CE:
                grad = tl.where(at == label, grad - ce_weight, grad)
            grad = grad * _slope(s, s_scale, s_cap, S_FORM)
            tl.debug_barrier()  # the gradient may lie in the logits' own memory
            tl.store(G + at, grad.to(G.dtype.element_ty), mask=at < W)
        grad = kd_weight * difference
        if WITH_CE:
            grad += ce_weight * (tl.exp(x - hard_top) / hard_total - tl.where(ids == label, 1.0, 0.0))
        grad = grad * _slope(x, s_scale, s_cap, S_FORM)
        tl.debug_barrier()  # these are written over the second pass's
        tl.store(G + ids, grad.to(G.dtype.element_ty), mask=there)


def known_triton_rows(tensors: Rows, options: Options) -> None:
    """Do what `rows_eager.eager_rows` does for a TeacherTopK and the forward KL."""
    student, teacher, labels, ce, divergence, grad = tensors
    assert isinstance(teacher, TeacherTopK) and options.divergence == "forward_kl"
    rows, width = student.shape
    out = student if grad is None else grad
    assert out.shape == student.shape, "both have the same padding"
    with torch.cuda.device(student.device) if student.is_cuda else torch.no_grad():
        known_row_kernel[(rows,)](
            student, out, labels, ce, divergence,
            teacher.ids.contiguous(), teacher.log_probs.float().contiguous(), teacher.log_tail.float().contiguous(),
            student.stride(0), out.stride(0), options.vocab_size, width, teacher.ids.shape[1],
            float(options.ce_weight), float(options.kd_weight / options.temperature), 1.0 / options.temperature,
            float(options.student_form.scale), float(options.student_form.softcap),
            ONE_SOFTMAX=options.temperature == 1,
            WITH_CE=options.ce_weight != 0,
            WRITE=grad is not None,
            S_FORM=form_number(options.student_form),
            KNOWN=max(16, triton.next_power_of_2(teacher.ids.shape[1])),
            BLOCK=min(BLOCK, triton.next_power_of_2(width)),
            ALIGN=ALIGN,
            num_warps=NUM_WARPS,
        )  # fmt: skip
