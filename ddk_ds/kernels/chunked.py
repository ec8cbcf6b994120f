"""The loop over chunks of tokens: logits of both models into reused buffers, the row kernel, two gradient matmuls.

Gradients are computed in the forward pass, so nothing of size tokens x vocabulary is ever kept and nothing is computed
twice. They are kept as sums over valid tokens in the compute dtype (float32, or float64 for float64 inputs): the
division by the count and the incoming gradient are one multiplication in the backward pass, and the only rounding to
the parameter's dtype.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ddk_ds.errors import ConfigError
from ddk_ds.kernels import products_native, rows_native
from ddk_ds.kernels.options import ALIGN, GROUP_CHUNKS, Options, Rows, TeacherTopK, padded
from ddk_ds.kernels.products_native import add_half_product, half_product
from ddk_ds.kernels.rows_eager import eager_rows
from ddk_ds.kernels.rows_native import add_half

try:
    from ddk_ds.kernels.known_rows_triton import known_triton_rows
    from ddk_ds.kernels.rows_triton import triton_rows, triton_scaled
except ImportError:  # Triton comes with CUDA builds of torch only
    triton_rows = known_triton_rows = triton_scaled = None  # type: ignore[assignment]

# Weight rows at a time where a tensor of the weight's size must not be made: a cast tile stays in cache.
TILE_ROWS = 2048
_MOST_KNOWN = 4096  # known tokens of a row that Triton's kernel holds in registers
# On CUDA the tensor cores multiply bf16 and fp16 exactly and give float32 sums.
_HAS_MIXED_MM = "dtype_out" in torch.ops.aten.addmm.overloads()

RowKernel = Callable[[Rows, Options], None]


class HeadInput(NamedTuple):
    """One model's hidden states (n, H), and its output head: weight (V, H) and bias (V,) or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


class Wanted(NamedTuple):
    """One flag for each of the student's tensors: True if its gradient is computed."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class Call(NamedTuple):
    """The tensors of one call of `run_chunks`."""

    student: HeadInput
    teacher: HeadInput | TeacherTopK | None
    """None for cross-entropy alone."""
    labels: Tensor
    """(n,) int64."""
    valid_rows: Tensor | None = None
    """(m,) int64, the rows that are computed; None for all."""
    wanted: Wanted = Wanted()
    """Gradients of the student's tensors to compute."""
    row_weights: Tensor | None = None
    """(n,) in the compute dtype, factors of the rows' losses; None: all are 1."""


class Sums(NamedTuple):
    """Sums over valid tokens: scalars and (n,) by token in float64, gradients in the compute dtype.

    Scalars and gradients have the rows' weights in them, what is by token has not. A gradient that is not wanted is
    None.
    """

    total: Tensor
    ce: Tensor
    kl: Tensor
    hidden_grad: Tensor | None
    weight_grad: Tensor | None
    bias_grad: Tensor | None
    token_ce: Tensor
    token_kl: Tensor


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which losses and gradients are summed: float64 for float64 inputs, else float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def logits_dtype(hidden: Tensor, options: Options) -> torch.dtype:
    """Return the dtype of the logits: that of `hidden` if `options.logits_dtype` is "model", else `compute_dtype`."""
    return hidden.dtype if options.logits_dtype == "model" else compute_dtype(hidden)


def row_kernel(device: torch.device, dtype: torch.dtype, options: Options, *, known: int = 0) -> RowKernel:
    """Return the row kernel that `options.engine` names, or for "auto" the fastest one that this machine has.

    `known` is the number of tokens of a row that a teacher is known by, 0 for all. A compiled kernel compares those by
    the forward KL alone, for which caches of a teacher are made.

    Raises:
        ConfigError: the engine has no kernel for logits of `dtype` on `device`.
    """
    if known and (options.divergence != "forward_kl" or (device.type == "cuda" and known > _MOST_KNOWN)):
        return eager_rows
    engine = options.engine
    if engine == "auto" and device.type == "cuda" and triton_rows is not None and dtype != torch.float64:
        engine = "triton"
    elif engine == "auto":
        engine = "native" if device.type == "cpu" and rows_native.supports(dtype) else "eager"
    if engine == "triton" and triton_rows is not None:
        return known_triton_rows if known else triton_rows
    if engine == "native" and device.type == "cpu" and rows_native.supports(dtype):
        return rows_native.native_rows
    if engine != "eager":
        raise ConfigError(f"engine is {engine!r}: it has no kernel for {dtype} on {device} here; give 'auto'")
    return eager_rows


def run_chunks(call: Call, options: Options) -> Sums:
    """Compute the sums of the losses and of the wanted gradients, without waiting for the device.

    An ignored row is computed on zeros instead of its own hidden state, so that nothing in it, NaN included, reaches a
    sum. With `valid_rows` the other rows are left out before the matmuls. A label outside the vocabulary is a
    RuntimeError, on a GPU a device assertion.
    """
    sums = _initial_sums(call)
    targets = torch.where(call.labels == options.ignore_index, -1, call.labels)
    torch._assert_async(
        (targets < options.vocab_size).all() & (targets >= 0).eq(call.labels != options.ignore_index).all(),
        f"labels: one is outside 0..{options.vocab_size - 1} and not {options.ignore_index} (ignored): check the data",
    )
    loop = _Loop(call, options, sums, targets)
    for start in range(0, loop.num_rows, options.chunk_tokens):
        loop.chunk(start, min(start + options.chunk_tokens, loop.num_rows))
    ce, kl = (_total(by_token, call.row_weights) for by_token in (sums.token_ce, sums.token_kl))
    return sums._replace(total=options.ce_weight * ce + options.kd_weight * kl, ce=ce, kl=kl)


def _total(by_token: Tensor, weights: Tensor | None) -> Tensor:
    return by_token.sum() if weights is None else torch.dot(by_token, weights.to(by_token.dtype))


def _initial_sums(call: Call) -> Sums:
    """Return sums of 0; only the weight's gradient is uninitialised memory, which `_Loop` fills."""
    (hidden, weight, _), wanted = call.student, call.wanted
    dtype = compute_dtype(hidden)
    scalar, by_token = (hidden.new_zeros(shape, dtype=torch.float64) for shape in ((), (len(hidden),)))
    return Sums(
        total=scalar,
        ce=scalar,
        kl=scalar,
        hidden_grad=torch.zeros_like(hidden, dtype=dtype) if wanted.hidden else None,
        weight_grad=torch.empty_like(weight, dtype=dtype) if wanted.weight else None,
        bias_grad=weight.new_zeros(len(weight), dtype=dtype) if wanted.bias else None,
        token_ce=by_token,
        token_kl=by_token.clone(),
    )


class _Loop:
    """Heads, buffers and the row kernel that all chunks use, and the sums to which they add."""

    def __init__(self, call: Call, options: Options, sums: Sums, targets: Tensor) -> None:
        self.call, self.options, self.sums, self.targets = call, options, sums, targets
        vocab_size, hidden = options.vocab_size, call.student.hidden
        dtype = logits_dtype(hidden, options)
        self.student = Head(call.student.weight, call.student.bias, vocab_size, dtype)
        known = call.teacher.ids.shape[1] if isinstance(call.teacher, TeacherTopK) else 0
        self.kernel = row_kernel(hidden.device, dtype, options, known=known)
        self.num_rows = len(hidden) if call.valid_rows is None else len(call.valid_rows)
        chunk = max(1, min(options.chunk_tokens, self.num_rows))
        # Chunks whose gradients go through one matmul; gradients in the logits' dtype lie over the student's logits.
        wanted, grad_dtype = any(call.wanted), self.student.grad_dtype
        self.in_place = grad_dtype == dtype
        grouped = wanted and grad_dtype.itemsize == 2 and (hidden.is_cuda or not self.in_place)
        group = max(1, min(GROUP_CHUNKS * chunk, self.num_rows)) if grouped else chunk
        self.logits = row_buffer("logits", group if self.in_place else chunk, vocab_size, dtype, hidden)
        self.teacher: _Teacher | TeacherTopK | None = None
        if isinstance(call.teacher, HeadInput):
            self.teacher = _Teacher(call.teacher, chunk, vocab_size, dtype)
        else:
            self.teacher = call.teacher
        self.grads = self.logits if wanted else None
        if wanted and not self.in_place:
            self.grads = row_buffer("grads", group, vocab_size, grad_dtype, hidden)
        self.has_weight_grad = False
        if sums.weight_grad is not None:
            sums.weight_grad[len(self.student.weight) if self.num_rows else 0 :] = 0
        self.student_hidden = hidden.new_empty(group, hidden.shape[1])

    def chunk(self, start: int, stop: int) -> None:
        """Compute the losses of one chunk, and add up the gradients of a group of chunks when the group is complete.

        The chunk is tokens start..stop-1, or the tokens valid_rows[start:stop] if `valid_rows` is given.
        """
        rows = self._rows(start, stop)
        targets = self.targets[rows]
        group_start = start // len(self.student_hidden) * len(self.student_hidden)
        place = slice(start - group_start, stop - group_start)  # of the chunk in its group
        hidden = _take(self.call.student.hidden, rows, targets, self.student_hidden[place])
        logits = self.logits[place if self.in_place else slice(0, stop - start)]
        self.student.logits(hidden, logits)
        ce, kl = self.sums.token_ce[rows], self.sums.token_kl[rows]
        grads = None if self.grads is None else self.grads[place]
        self.kernel(Rows(logits, self._teacher_rows(rows, targets), targets, ce, kl, grads), self.options)
        if self.call.valid_rows is not None:  # indexing copied
            self.sums.token_ce[rows], self.sums.token_kl[rows] = ce, kl
        if self.grads is not None and (place.stop == len(self.student_hidden) or stop == self.num_rows):
            group = slice(0, place.stop)
            self._add_grads(self.grads[group], self.student_hidden[group], self._rows(group_start, stop))

    def _rows(self, start: int, stop: int) -> slice | Tensor:
        valid = self.call.valid_rows
        return slice(start, stop) if valid is None else valid[start:stop]

    def _teacher_rows(self, rows: slice | Tensor, targets: Tensor) -> Tensor | TeacherTopK | None:
        teacher = self.teacher
        if isinstance(teacher, TeacherTopK):
            return TeacherTopK(*(tensor[rows] for tensor in teacher))
        return None if teacher is None else teacher.logits(rows, targets)

    def _add_grads(self, grad: Tensor, hidden: Tensor, rows: slice | Tensor) -> None:
        """Add the gradients of a group's tokens `rows` from those of its logits (m, W) and its hidden states (m, H).

        A row's weight multiplies the smaller factor of each product, so that it costs a pass over the logits for a
        bias alone.
        """
        sums, classes = self.sums, self.options.vocab_size
        weights = None if self.call.row_weights is None else self.call.row_weights[rows][:, None]
        if sums.hidden_grad is not None:
            whole = isinstance(rows, slice)
            part = sums.hidden_grad[rows] if whole else hidden.new_empty(hidden.shape, dtype=sums.hidden_grad.dtype)
            self.student.hidden_grad(grad, part)
            if weights is not None:
                part.mul_(weights)
            if not whole:
                sums.hidden_grad[rows] = part
        if weights is not None:
            hidden = (hidden * weights).to(hidden.dtype)
        if sums.weight_grad is not None:
            self.student.add_weight_grad(grad, hidden, sums.weight_grad, keep=self.has_weight_grad)
            self.has_weight_grad = True
        if sums.bias_grad is not None:
            of_rows = grad[:, :classes] if weights is None else grad[:, :classes] * weights
            sums.bias_grad[:classes].add_(of_rows.sum(0, dtype=sums.bias_grad.dtype))


class _Teacher:
    """The teacher's head and its buffers for one chunk."""

    def __init__(self, head_input: HeadInput, chunk: int, vocab_size: int, dtype: torch.dtype) -> None:
        self._hidden = head_input.hidden
        self._head = Head(head_input.weight, head_input.bias, vocab_size, dtype)
        self._logits = row_buffer("teacher", chunk, vocab_size, dtype, self._hidden)
        self._chunk_hidden = self._hidden.new_empty(chunk, self._hidden.shape[1])

    def logits(self, rows: slice | Tensor, targets: Tensor) -> Tensor:
        """Return the logits (m, W) of the tokens `rows`, in memory that the next call overwrites."""
        logits = self._logits[: len(targets)]
        self._head.logits(_take(self._hidden, rows, targets, self._chunk_hidden[: len(targets)]), logits)
        return logits


def _take(hidden: Tensor, rows: slice | Tensor, targets: Tensor, out: Tensor) -> Tensor:
    """Copy hidden[rows] to `out` (m, H), with zeros in rows whose target is negative, and return it."""
    return out.copy_(hidden[rows]).masked_fill_((targets < 0)[:, None], 0)


def row_buffer(use: str, rows: int, vocab_size: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return a buffer (rows, W), uninitialised but for zeros as padding; `use` names it among the kept ones."""
    buffer = _workspace(use, (rows, padded(vocab_size)), dtype, like)
    # torch's bf16 matmul on a CPU reads past the vocabulary's end and multiplies by zero: no NaN may lie there.
    buffer[:, vocab_size:] = 0
    return buffer


_kept = threading.local()


def _workspace(use: str, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return uninitialised memory. On a CPU the thread's next call for this `use` gets the same, if it is large enough.

    torch's allocator for CUDA does this itself. On a CPU memory of this size is mapped anew at every call, and the
    page faults of a float32 chunk cost more than its row kernel.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape, dtype=dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = getattr(_kept, use, None)
    if memory is None or len(memory) < num_bytes:
        memory = None  # the old one goes before the new one comes
        setattr(_kept, use, None)
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        setattr(_kept, use, memory)
    return memory[:num_bytes].view(dtype).view(shape)


class Head:
    """One model's output head: its three matmuls in any dtypes of weight, logits and sums.

    cuBLAS is at its best where each size is a multiple of 16 bytes, which a vocabulary V seldom is. So on a GPU the
    matmuls take further rows of the weight, up to the width W of the logits. A head without them, and the hidden
    states' gradient (where 0 times a padding row's NaN would be NaN), take a multiple of ALIGN rows and then the rest.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, vocab_size: int, logits_dtype: torch.dtype) -> None:
        """Keep views of weight and bias; `logits_dtype` is the weight's own, or wider."""
        self._vocab_size, self._aligned = vocab_size, wants_multiples(weight)
        rows = padded(vocab_size) if self._aligned and len(weight) >= padded(vocab_size) else vocab_size
        self.weight = weight.detach()[:rows]
        """The rows that take part in matmuls: V, or W."""
        self.logits_dtype = logits_dtype
        self.bias = None if bias is None else bias.detach()[:rows].to(logits_dtype)
        self._half_products = has_fast_half(weight) and products_native.supports(weight)
        mixed = logits_dtype == torch.float32 and (self._half_products or (weight.is_cuda and _HAS_MIXED_MM))
        # Without a matmul of half-precision inputs with float32 output, tiles of the weight are cast.
        self._factor_dtype = weight.dtype if mixed else logits_dtype
        self.grad_dtype = weight.dtype if mixed or has_fast_half(weight) else logits_dtype
        """Dtype in which gradients of the logits enter the two matmuls."""
        self._memory: dict[torch.dtype, Tensor] = {}

    def _parts(self, rows: int) -> Iterator[slice]:
        """Yield slices of 0..rows-1 for one matmul each."""
        whole = rows // ALIGN * ALIGN if self._aligned else rows
        for start, stop in ((0, whole), (whole, rows)):
            if start < stop:
                yield slice(start, stop)

    def _tiles(self, dtype: torch.dtype, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield (some of the weight's first `rows` rows, these in `dtype`), in tiles where the weight must be cast."""
        if dtype == self.weight.dtype:
            yield from ((part, self.weight[part]) for part in self._parts(rows))
            return
        tile = self._scratch(min(TILE_ROWS, rows), dtype)
        for start in range(0, rows, len(tile)):
            part = slice(start, min(start + len(tile), rows))
            yield part, tile[: part.stop - start].copy_(self.weight[part])

    def _scratch(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Return (rows, H), the same memory at every call: a new tensor's pages cost more than the work on them."""
        if dtype not in self._memory:
            self._memory[dtype] = self.weight.new_empty(rows, self.weight.shape[1], dtype=dtype)
        return self._memory[dtype]

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """Write hidden (m, H) @ weight.T + bias to the first V columns of out (m, W); padding may be written too."""
        hidden = hidden.to(self._factor_dtype)
        for rows, weight in self._tiles(self._factor_dtype, len(self.weight)):
            if self.bias is not None and weight.dtype == out.dtype:
                torch.addmm(self.bias[rows], hidden, weight.t(), out=out[:, rows])
                continue
            if self._half_products and out.dtype == torch.float32:
                half_product(hidden, weight, out[:, rows])
            else:
                _matmul(hidden, weight.t(), out[:, rows], keep=False)
            if self.bias is not None:
                out[:, rows].add_(self.bias[rows])

    def hidden_grad(self, grad: Tensor, out: Tensor) -> None:
        """Write grad (m, W) @ weight to out (m, H), without padding; `grad` has the dtype `grad_dtype`."""
        for rows, weight in self._tiles(grad.dtype, self._vocab_size):
            _matmul(grad[:, rows], weight, out, keep=rows.start > 0)

    def add_weight_grad(self, grad: Tensor, hidden: Tensor, total: Tensor, *, keep: bool) -> None:
        """Add grad (m, W).T @ hidden (m, H) to the head's rows of total (Vs, H), or overwrite them if not `keep`."""
        hidden = hidden.to(grad.dtype)
        if grad.dtype == total.dtype or (grad.is_cuda and _HAS_MIXED_MM):
            for rows in self._parts(len(self.weight)):
                _matmul(grad[:, rows].t(), hidden, total[rows], keep=keep)
            return
        size = len(self.weight)
        if self._half_products:
            add_half_product(grad[:, :size], hidden, total, keep=keep)
            return
        product = self._scratch(min(TILE_ROWS, size), grad.dtype)
        for start in range(0, size, TILE_ROWS):
            rows = slice(start, min(start + TILE_ROWS, size))
            part = product[: rows.stop - start]
            torch.mm(grad[:, rows].t(), hidden, out=part)
            add_half(total[rows], part, keep=keep)


def wants_multiples(weight: Tensor) -> bool:
    """Return True if matmuls with the weight are faster where each size is a multiple of 16 bytes."""
    return weight.is_cuda


def has_fast_half(weight: Tensor) -> bool:
    """Return True if the weight is bfloat16 on a CPU that multiplies bfloat16 in hardware."""
    if weight.is_cuda or weight.dtype != torch.bfloat16:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _matmul(a: Tensor, b: Tensor, out: Tensor, *, keep: bool) -> None:
    """Add a @ b to `out`; if `keep` is false, overwrite `out` with it."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(keep), out=out)
    elif a.is_cuda and _HAS_MIXED_MM and out.dtype == torch.float32:
        torch.addmm(out, a, b, beta=int(keep), out_dtype=out.dtype, out=out)
    else:
        out.add_(a @ b) if keep else out.copy_(a @ b)
