"""One model's output head: its three matmuls, whatever the dtypes of weights, logits and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ddk_ds.kernels.rows_native import add_half

# Weight rows at a time where a tensor of the weight's size must not be made: a cast tile stays in cache.
TILE_ROWS = 2048

# On CUDA the tensor cores multiply bf16 and fp16 exactly and give float32 sums.
_HAS_MIXED_MM = "dtype_out" in torch.ops.aten.mm.overloads()
_HAS_MIXED_ADDMM = "dtype_out" in torch.ops.aten.addmm.overloads()


class Head:
    """An output head cut to `vocab_size` rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, vocab_size: int, logits_dtype: torch.dtype) -> None:
        """`logits_dtype`: the weight's own, or wider."""
        self.weight = weight.detach()[:vocab_size]
        self.logits_dtype = logits_dtype
        self.bias = None if bias is None else bias.detach()[:vocab_size].to(logits_dtype)
        mixed = weight.is_cuda and _HAS_MIXED_MM and logits_dtype == torch.float32
        # A CPU has no matmul of half-precision inputs with float32 output: tiles of the weight are cast.
        self._factor_dtype = weight.dtype if mixed else logits_dtype
        self.grad_dtype = weight.dtype if mixed or has_fast_half(weight) else logits_dtype
        """Dtype in which gradients of the logits enter the two matmuls."""
        self._memory: dict[torch.dtype, Tensor] = {}

    def _tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the vocabulary, the weight's rows in `dtype`); one where none is cast."""
        if dtype == self.weight.dtype:
            yield slice(0, len(self.weight)), self.weight
            return
        tile = self._scratch(min(TILE_ROWS, len(self.weight)), dtype)
        for start in range(0, len(self.weight), len(tile)):
            rows = slice(start, min(start + len(tile), len(self.weight)))
            yield rows, tile[: rows.stop - start].copy_(self.weight[rows])

    def _scratch(self, rows: int, dtype: torch.dtype) -> Tensor:
        """(rows, H), the same memory at every call: a new tensor's pages cost more than the work on them."""
        if dtype not in self._memory:
            self._memory[dtype] = self.weight.new_empty(rows, self.weight.shape[1], dtype=dtype)
        return self._memory[dtype]

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """out (m, V) = hidden (m, H) @ weight.T + bias."""
        hidden = hidden.to(self._factor_dtype)
        for rows, weight in self._tiles(self._factor_dtype):
            if self.bias is not None and weight.dtype == out.dtype:
                torch.addmm(self.bias[rows], hidden, weight.t(), out=out[:, rows])
                continue
            _matmul(hidden, weight.t(), out[:, rows])
            if self.bias is not None:
                out[:, rows].add_(self.bias[rows])

    def hidden_grad(self, grad: Tensor, out: Tensor) -> None:
        """out (m, H) = grad (m, V) @ weight; `grad` in grad_dtype."""
        if grad.dtype == self.weight.dtype:
            _matmul(grad, self.weight, out)
            return
        out.zero_()
        for rows, weight in self._tiles(grad.dtype):
            out.addmm_(grad[:, rows], weight)

    def add_weight_grad(self, grad: Tensor, hidden: Tensor, total: Tensor, *, keep: bool) -> None:
        """total (V, H) = grad (m, V).T @ hidden (m, H) + (total if keep), in the dtype of `total`."""
        hidden = hidden.to(grad.dtype)
        if grad.dtype == total.dtype:
            total.addmm_(grad.t(), hidden, beta=int(keep))
        elif grad.is_cuda and _HAS_MIXED_ADDMM:
            torch.addmm(total, grad.t(), hidden, beta=int(keep), out_dtype=total.dtype, out=total)
        else:
            product = self._scratch(min(TILE_ROWS, len(total)), grad.dtype)
            for start in range(0, len(total), TILE_ROWS):
                rows = slice(start, min(start + TILE_ROWS, len(total)))
                part = product[: rows.stop - start]
                torch.mm(grad[:, rows].t(), hidden, out=part)
                add_half(total[rows], part, keep=keep)


def has_fast_half(weight: Tensor) -> bool:
    """Whether this CPU multiplies the weight's dtype, bfloat16, in hardware."""
    if weight.is_cuda or weight.dtype != torch.bfloat16:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and _HAS_MIXED_MM and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)
