"""The element-wise part on a GPU: one Triton program a row reads both models' logits and writes the gradient.

The formulas are those of divergences.py, and rows.cpp computes the same on a CPU. Each pass over a row reads 4 bytes an
element of each model, and the last one writes the gradient. Cross-entropy with forward KL takes two passes: with a
half-precision gradient 18 bytes an element. Other divergences need sum(p h) first, which is one pass more.

Rows are read and written to their width W, a multiple of 64, so that loads and stores are wide for any vocabulary V. A
program first lowers its row's padding so far that its probabilities and gradients are 0. (Comparing each element's
place with V instead took 20 to 50 registers more.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ddk_ds.kernels.divergences import KIND, teacher_weight
from ddk_ds.kernels.options import ALIGN, LogitForm, Options, Rows, TeacherTopK

# Elements of a row at a time and warps of a program: 64 registers a thread without a spill on sm_90. Tried on an H100:
# parts of a row shared by programs that wait for each other, and its second reading from the L2 cache, were slower.
BLOCK, NUM_WARPS = 4096, 8
LOW = tl.constexpr(-1.0e30)


@triton.jit
def _series(w):  # 2 atanh(w) for |w| <= 0.1716
    w2 = w * w
    return ((((2.0 / 9.0) * w2 + 2.0 / 7.0) * w2 + 2.0 / 5.0) * w2 + 2.0 / 3.0) * w2 * w + 2.0 * w


@triton.jit
def _log_of(u, y):  # log(u) with y = u - 1 exact where u is near 1: no approximate instruction, whose error is absolute
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    w = tl.where(exponent == 0, y / (2.0 + y), (m - 1.0) / (m + 1.0))
    return _series(w) + exponent.to(tl.float32) * 0.693147180


@triton.jit
def _expm1(x):
    series = 1.0 / 5040.0
    series = series * x + 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = series * x + 0.5
    series = series * x * x + x
    return tl.where(tl.abs(x) < 0.35, series, tl.exp(x) - 1.0)


@triton.jit
def _logits(pointers, mask, scale, cap, FORM: tl.constexpr):
    loaded = tl.load(pointers, mask=mask, other=LOW)
    raw = loaded.to(tl.float32)
    x = raw
    if FORM >= 1:
        x = x * scale
    if FORM == 2:
        e = _expm1(-2.0 * tl.abs(x / cap))
        x = cap * tl.where(x < 0, e / (e + 2.0), -e / (e + 2.0))
    if FORM >= 1 or loaded.dtype == tl.float16:  # padding is LOW in any form, and -inf in float16
        x = tl.where(raw <= 0.1 * LOW, LOW, x)
    return x


@triton.jit
def _element(q, p, r, b, KIND: tl.constexpr):
    """Return the divergence's term of each logit, and h, from which its gradient is p * (h - sum p h).

    For the forward KL h is the gradient itself.
    """
    # p - q from r where they are close: their own rounding would be all that is left.
    close = tl.abs(r) < 0.35
    x = -r
    if KIND == 2:
        x = r
    second = 1.0 / 40320.0
    second = second * x + 1.0 / 5040.0
    second = second * x + 1.0 / 720.0
    second = second * x + 1.0 / 120.0
    second = second * x + 1.0 / 24.0
    second = second * x + 1.0 / 6.0
    second = (second * x + 0.5) * x * x  # exp(x) - 1 - x
    d = p - q
    if KIND != 2:
        d = tl.where(close, q * (second - r), d)
    if KIND == 1:
        value = tl.where(close, q * second, q * r + d)
        h = d
    elif KIND == 2:
        value = tl.where(close, p * second, -d - p * r)
        h = -r
    elif KIND == 6:
        value = 0.5 * tl.abs(d)
        h = tl.where(r > 0, -0.5, tl.where(r < 0, 0.5, r))
    else:
        w = tl.where(r >= 0, 1.0 - b, b)
        y = w * _expm1(-tl.abs(r))
        log_larger = -_log_of(1.0 + y, y)
        log_q_m = tl.where(r >= 0, log_larger, log_larger + r)
        log_p_m = tl.where(r >= 0, log_larger - r, log_larger)
        if KIND == 3:
            value = b * q * log_q_m + (1.0 - b) * p * log_p_m
            h = (1.0 - b) * log_p_m
        elif KIND == 4:
            value = q * log_q_m + (1.0 - b) * d
            h = -(1.0 - b) * _expm1(log_q_m)
        else:
            value = p * log_p_m - b * d
            h = log_p_m - (1.0 - b) * _expm1(log_p_m)
    return value, h


@triton.jit
def _online(x, top, total):
    """Update the running maximum and the sum of exp(x - maximum)."""
    new = tl.maximum(top, tl.max(x, 0))
    return new, total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)


@triton.jit
def _lower_padding(X, V, W, ALIGN: tl.constexpr):
    """Set the logits from V to W - 1 to LOW."""
    at = W - ALIGN + tl.arange(0, ALIGN)
    tl.store(X + at, tl.full([ALIGN], LOW, dtype=tl.float32).to(X.dtype.element_ty), mask=at >= V)


@triton.jit
def _softmaxes(
    S, T, V, W, inv_t, s_scale, s_cap, t_scale, t_cap,
    KIND: tl.constexpr, ONE_SOFTMAX: tl.constexpr, WITH_CE: tl.constexpr,
    S_FORM: tl.constexpr, T_FORM: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Lower the row's padding, read the row once and return three pairs (maximum, sum of exp(x - maximum)).

    x are the student's logits (for the CE), the student's logits / T, and the teacher's logits / T. A pair that the
    flags exclude is (LOW, 0); with ONE_SOFTMAX the second pair is the first.
    """
    _lower_padding(S, V, W, ALIGN)
    if KIND > 0:
        _lower_padding(T, V, W, ALIGN)
    tl.debug_barrier()  # the padding is read by other threads than those that wrote it
    h_top = LOW
    h_sum = 0.0
    s_top = LOW
    s_sum = 0.0
    t_top = LOW
    t_sum = 0.0
    columns = tl.arange(0, BLOCK)
    for start in range(0, W, BLOCK):
        at = start + columns
        s = _logits(S + at, at < W, s_scale, s_cap, S_FORM)
        if WITH_CE or ONE_SOFTMAX:
            h_top, h_sum = _online(s, h_top, h_sum)
        if not ONE_SOFTMAX:
            s_top, s_sum = _online(s * inv_t, s_top, s_sum)
        if KIND > 0:
            t = _logits(T + at, at < W, t_scale, t_cap, T_FORM)
            t_top, t_sum = _online(t * inv_t, t_top, t_sum)
    if ONE_SOFTMAX:
        s_top = h_top
        s_sum = h_sum
    return h_top, h_sum, s_top, s_sum, t_top, t_sum


@triton.jit
def _compare(s, t, ok, inv_t, s_top, s_inverse, t_top, t_inverse, offset, mix, KIND: tl.constexpr):
    """Return for a block of logits the student's probabilities p at T, and value and h of `_element`.

    `ok` is False outside the row, where p and the log ratio of the two models are set to 0.
    """
    p = tl.where(ok, tl.exp(s * inv_t - s_top) * s_inverse, 0.0)
    q = tl.where(ok, tl.exp(t * inv_t - t_top) * t_inverse, 0.0)
    value, h = _element(q, p, tl.where(ok, (t - s) * inv_t + offset, 0.0), mix, KIND)
    return p, value, h


@triton.jit
def _skip_row(G, CE, D, W, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(CE, 0.0)
    tl.store(D, 0.0)
    if WRITE:
        for start in range(0, W, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(G + at, tl.zeros([BLOCK], dtype=G.dtype.element_ty), mask=at < W)


@triton.jit
def _slope(s, s_scale, s_cap, S_FORM: tl.constexpr):
    """Return the derivative of the logit `s` with respect to the raw product hidden @ weight.T + bias."""
    slope = 1.0
    if S_FORM == 1:
        slope = s_scale
    if S_FORM == 2:
        bend = tl.maximum(s / s_cap, -1.0)  # padding's is very low
        slope = s_scale * (1.0 - bend * bend)
    return slope


@triton.jit(do_not_specialize=["V"])
def row_kernel(
    S, T, G, Y, CE, D, s_stride, t_stride, g_stride, V, W,
    ce_weight, kd_weight, inv_t, mix, s_scale, s_cap, t_scale, t_cap,
    KIND: tl.constexpr, ONE_SOFTMAX: tl.constexpr, WITH_CE: tl.constexpr, WRITE: tl.constexpr,
    S_FORM: tl.constexpr, T_FORM: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(Y + row)
    S += row * s_stride
    T += row * t_stride
    G += row * g_stride
    if label < 0:
        _skip_row(G, CE + row, D + row, W, WRITE, BLOCK)
        return
    h_top, h_sum, s_top, s_sum, t_top, t_sum = _softmaxes(
        S, T, V, W, inv_t, s_scale, s_cap, t_scale, t_cap, KIND, ONE_SOFTMAX, WITH_CE, S_FORM, T_FORM, BLOCK, ALIGN
    )
    ce = 0.0
    if WITH_CE:
        at_label = _logits(S + label, label < V, s_scale, s_cap, S_FORM)
        ce = (h_top - at_label) + _log_of(h_sum, h_sum - 1.0)
    tl.store(CE + row, ce)
    columns = tl.arange(0, BLOCK)
    h_inverse = 1.0 / h_sum
    s_inverse = 1.0 / s_sum
    t_inverse = 1.0 / t_sum
    offset = 0.0
    centre = 0.0
    if KIND > 0:
        offset = (s_top - t_top) + _log_of(s_sum / t_sum, (s_sum - t_sum) / t_sum)
    if KIND > 1:  # sum p h
        for start in range(0, W, BLOCK):
            at = start + columns
            s = _logits(S + at, at < W, s_scale, s_cap, S_FORM)
            t = _logits(T + at, at < W, t_scale, t_cap, T_FORM)
            p, value, h = _compare(s, t, at < W, inv_t, s_top, s_inverse, t_top, t_inverse, offset, mix, KIND)
            centre += tl.sum(p * h, 0)
    divergence = 0.0
    if KIND > 0 or WRITE:
        for start in range(0, W, BLOCK):
            at = start + columns
            s = _logits(S + at, at < W, s_scale, s_cap, S_FORM)
            grad = tl.zeros([BLOCK], dtype=tl.float32)
            if KIND > 0:
                t = _logits(T + at, at < W, t_scale, t_cap, T_FORM)
                p, value, h = _compare(s, t, at < W, inv_t, s_top, s_inverse, t_top, t_inverse, offset, mix, KIND)
                divergence += tl.sum(value, 0)
                grad = kd_weight * (h if KIND == 1 else p * (h - centre))
                if ONE_SOFTMAX and WITH_CE:
                    grad += ce_weight * p
            if WITH_CE and (KIND == 0 or not ONE_SOFTMAX):
                grad += ce_weight * (tl.exp(s - h_top) * h_inverse)
            if WITH_CE:
                grad = tl.where(at == label, grad - ce_weight, grad)
            if WRITE:
                grad = grad * _slope(s, s_scale, s_cap, S_FORM)
                # The gradient may lie in the logits' own memory: every load of a block comes before its stores.
                tl.debug_barrier()
                tl.store(G + at, grad.to(G.dtype.element_ty), mask=at < W)
    tl.store(D + row, divergence)


def form_number(form: LogitForm) -> int:
    """Return the kernel's number of a form: 0 for plain logits, 1 with a scale only, 2 with a softcap."""
    return 2 if form.softcap else int(form.scale != 1)


def triton_rows(tensors: Rows, options: Options) -> None:
    """Do what `rows_eager.eager_rows` does, on a GPU (or on a CPU under Triton's interpreter)."""
    student, teacher, labels, ce, divergence, grad = tensors
    assert not isinstance(teacher, TeacherTopK), "known_rows_triton.py is for a teacher that is not here"
    rows, width = student.shape
    other = student if teacher is None else teacher
    out = student if grad is None else grad
    assert other.shape == out.shape == student.shape, "all three have the same padding"
    block = min(BLOCK, triton.next_power_of_2(width))
    with torch.cuda.device(student.device) if student.is_cuda else torch.no_grad():
        row_kernel[(rows,)](
            student, other, out, labels, ce, divergence, student.stride(0), other.stride(0), out.stride(0),
            options.vocab_size, width,
            float(options.ce_weight), float(options.kd_weight / options.temperature), 1.0 / options.temperature,
            float(teacher_weight(options.divergence, options.coefficient)),
            float(options.student_form.scale), float(options.student_form.softcap),
            float(options.teacher_form.scale), float(options.teacher_form.softcap),
            KIND=0 if teacher is None else KIND[options.divergence],
            ONE_SOFTMAX=teacher is None or options.temperature == 1,
            WITH_CE=options.ce_weight != 0,
            WRITE=grad is not None,
            S_FORM=form_number(options.student_form),
            T_FORM=form_number(options.teacher_form),
            BLOCK=block,
            ALIGN=ALIGN,
            num_warps=NUM_WARPS,
        )  # fmt: skip


@triton.jit
def _scale_kernel(X, scale, OUT, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < size) * tl.load(scale)
    tl.store(OUT + at, x.to(OUT.dtype.element_ty), mask=at < size)


def triton_scaled(tensor: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return tensor * scale rounded to `dtype`; `scale` is a scalar on the same GPU. torch reads the memory twice."""
    out = torch.empty_like(tensor, dtype=dtype)
    with torch.cuda.device(tensor.device):
        _scale_kernel[(triton.cdiv(tensor.numel(), BLOCK),)](
            tensor, scale, out, tensor.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return out
