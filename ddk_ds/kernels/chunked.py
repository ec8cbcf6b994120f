"""Linear layer + cross-entropy + forward KL (Eq. 3 of arXiv 2407.16154), chunked over tokens, on any device.

The logits of one chunk of tokens live in two buffers that every chunk reuses; the gradients are computed in
the forward pass, so nothing of size tokens x vocabulary is ever kept and nothing is computed twice. Gradients
are kept as sums over valid tokens in the compute dtype (float32, or float64 for float64 inputs): the division
by the count and the incoming gradient are one multiplication in the backward pass, and the only rounding to
the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Weight rows cast at a time where a half-precision head has no float32-output matmul (CPU): the cast stays in
# cache.
CAST_TILE_ROWS = 2048
# Elements of one scratch buffer of the element-wise part: about a MiB on a CPU so that passes hit the cache;
# on a GPU enough to fill it.
CPU_BLOCK_ELEMENTS = 1 << 18
GPU_BLOCK_ELEMENTS = 1 << 23

HAS_MIXED_MM = "dtype_out" in torch.ops.aten.mm.overloads()


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of logits, statistics and gradient sums: float64 for float64 inputs, else float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Options:
    """What to compute; see `linear_kd.linear_kd_loss`."""

    gamma: float
    temperature: float
    vocab_size: int
    ignore_index: int
    chunk_tokens: int


class Head:
    """One model's output head cut to `vocab_size` rows: its three matmuls with results in `dtype`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, vocab_size: int, dtype: torch.dtype) -> None:
        self.weight = weight.detach()[:vocab_size]
        self.bias = None if bias is None else bias.detach()[:vocab_size].to(dtype)
        self.dtype = dtype
        self.is_cast = weight.dtype != dtype
        # On CUDA the tensor cores multiply bf16 / fp16 exactly and give float32 sums; elsewhere tiles are
        # cast.
        self.is_mixed = self.is_cast and HAS_MIXED_MM and weight.is_cuda and dtype == torch.float32
        self._tile = None
        if self.is_cast and not self.is_mixed:
            self._tile = weight.new_empty(min(CAST_TILE_ROWS, vocab_size), weight.shape[1], dtype=dtype)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Pairs (rows of the vocabulary, the weight's rows in `dtype`); one pair where no cast is needed."""
        if self._tile is None:
            yield slice(0, len(self.weight)), self.weight
            return
        for start in range(0, len(self.weight), len(self._tile)):
            rows = slice(start, min(start + len(self._tile), len(self.weight)))
            yield rows, self._tile[: rows.stop - start].copy_(self.weight[rows])

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """out (m, V) = hidden (m, H) @ weight.T + bias."""
        if self.is_mixed:
            torch.mm(hidden, self.weight.t(), out_dtype=self.dtype, out=out)
            if self.bias is not None:
                out.add_(self.bias)
            return
        hidden = hidden.to(self.dtype)
        for rows, weight in self._tiles():
            if self.bias is None:
                torch.mm(hidden, weight.t(), out=out[:, rows])
            else:
                torch.addmm(self.bias[rows], hidden, weight.t(), out=out[:, rows])

    def hidden_grad(self, grad: Tensor, out: Tensor) -> None:
        """out (m, H) = grad (m, V) @ weight."""
        if self.is_mixed:
            torch.mm(grad.to(self.weight.dtype), self.weight, out_dtype=self.dtype, out=out)
        elif self._tile is None:
            torch.mm(grad, self.weight, out=out)
        else:
            out.zero_()
            for rows, weight in self._tiles():
                out.addmm_(grad[:, rows], weight)

    def add_weight_grad(self, grad: Tensor, hidden: Tensor, total: Tensor) -> None:
        """total (V, H) += grad (m, V).T @ hidden (m, H)."""
        if not self.is_mixed:
            total.addmm_(grad.t(), hidden.to(self.dtype))
            return
        for start in range(0, len(total), CAST_TILE_ROWS):  # tiles: the product is a tensor of its own
            rows = slice(start, start + CAST_TILE_ROWS)
            part = grad[:, rows].to(hidden.dtype)
            total[rows].add_(torch.mm(part.t(), hidden, out_dtype=self.dtype))


@dataclass
class Sums:
    """Sums over valid tokens: losses (float64 scalars), gradients (compute dtype; None: not needed)."""

    ce: Tensor
    kl: Tensor
    hidden_grad: Tensor | None
    weight_grad: Tensor | None
    bias_grad: Tensor | None


def softmax_rows(logits: Tensor, probs: Tensor) -> Tensor:
    """probs (m, V) <- softmax(logits); returns L (m,) float64 with probs = exp(logits - L).

    L is that of the probs as computed, the rounding of their sum included: at the largest logit softmax gives
    exp(0) / sum, so L follows from the two maxima.
    """
    torch.softmax(logits, -1, out=probs)
    return logits.amax(-1).double() - probs.amax(-1).double().log()


class KDRows:
    """The element-wise part of Eq. 3, on blocks of rows."""

    def __init__(self, like: Tensor, gamma: float, temperature: float) -> None:
        """For logits like `like` (chunk, V)."""
        budget = GPU_BLOCK_ELEMENTS if like.is_cuda else CPU_BLOCK_ELEMENTS
        self.num_rows = max(1, min(len(like), budget // like.shape[1]))
        self.gamma, self.temperature = gamma, temperature
        self._scratch = [torch.empty_like(like[: self.num_rows]) for _ in range(2 if temperature == 1 else 3)]

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor, ce: Tensor, kl: Tensor) -> None:
        """Logits (m, V) of both; teacher <- d(CE + gamma T^2 KL)/d(student logits) + onehot(labels).

        ce, kl (m,) float64 <- the two terms of each row.
        """
        for start in range(0, len(student), self.num_rows):
            rows = slice(start, start + self.num_rows)
            ce[rows], kl[rows] = self._block(student[rows], teacher[rows], labels[rows])

    def _block(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        q, p, *rest = (buffer[: len(student)] for buffer in self._scratch)
        if self.temperature == 1:
            hard = p
            teacher_norm = softmax_rows(teacher, q)
            student_norm = hard_norm = softmax_rows(student, p)
        else:
            hard = rest[0]  # first the scaled logits of both, then softmax at T = 1 for the CE
            teacher_norm = softmax_rows(torch.mul(teacher, 1 / self.temperature, out=hard), q)
            student_norm = softmax_rows(torch.mul(student, 1 / self.temperature, out=hard), p)
            hard_norm = softmax_rows(student, hard)
        ce = hard_norm - student.gather(1, labels[:, None]).squeeze(1)
        # KL = sum(q r + (p - q)), r = log q - log p: each term is >= 0 and of second order near the teacher,
        # where sum(q r) alone loses its digits to cancellation. The logits are subtracted before the row's
        # constant is added: near the teacher that difference is exact.
        log_ratio = teacher.sub_(student)
        if self.temperature != 1:
            log_ratio.mul_(1 / self.temperature)
        log_ratio.add_((student_norm - teacher_norm).to(student.dtype)[:, None])
        kl = torch.linalg.vecdot(q, log_ratio).double()
        difference = torch.sub(p, q, out=q)
        kl += difference.sum(-1)
        torch.add(hard, difference, alpha=self.gamma * self.temperature, out=teacher)
        return ce, kl


def run_chunks(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor | None,
    teacher: Head | None,
    labels: Tensor,
    options: Options,
    needs: tuple[bool, bool, bool],
) -> Sums:
    """Losses and the gradients that `needs` (hidden, weight, bias) asks for, summed over valid tokens.

    An ignored row is computed on zeros instead of its own hidden state, so that nothing in it, NaN included,
    reaches a sum; this takes no branch on a device value.
    """
    num_tokens, num_classes = len(labels), options.vocab_size
    valid = labels != options.ignore_index
    ignored = ~valid[:, None]
    targets = torch.where(valid, labels, 0)
    buffer = student_hidden.new_empty(2, min(options.chunk_tokens, num_tokens), num_classes, dtype=student.dtype)
    kd_rows = KDRows(buffer[0], options.gamma, options.temperature) if teacher is not None else None
    rows_ce, rows_kl = student_hidden.new_zeros(2, num_tokens, dtype=torch.float64)
    hidden_grad = weight_grad = bias_grad = None
    if needs[0]:
        hidden_grad = torch.empty_like(student_hidden, dtype=student.dtype)
    if needs[1]:
        weight_grad = student.weight.new_zeros(student.weight.shape, dtype=student.dtype)
    if needs[2]:
        bias_grad = student.weight.new_zeros(num_classes, dtype=student.dtype)
    for start in range(0, num_tokens, options.chunk_tokens):
        rows = slice(start, min(start + options.chunk_tokens, num_tokens))
        logits, grad = buffer[:, : rows.stop - start]
        hidden = student_hidden[rows].masked_fill(ignored[rows], 0)
        student.logits(hidden, logits)
        if kd_rows is None or teacher is None or teacher_hidden is None:
            norm = softmax_rows(logits, grad)
            rows_ce[rows] = norm - logits.gather(1, targets[rows, None]).squeeze(1)
        else:
            teacher.logits(teacher_hidden[rows].masked_fill(ignored[rows], 0), grad)
            kd_rows(logits, grad, targets[rows], rows_ce[rows], rows_kl[rows])
        if any(needs):
            grad.scatter_add_(1, targets[rows, None], grad.new_full((1, 1), -1).expand(len(grad), 1))
        if hidden_grad is not None:
            student.hidden_grad(grad, hidden_grad[rows])
        if weight_grad is not None:
            student.add_weight_grad(grad, hidden, weight_grad)
        if bias_grad is not None:
            bias_grad += valid[rows].to(grad.dtype) @ grad
    if hidden_grad is not None:
        hidden_grad.masked_fill_(ignored, 0)
    ce = torch.where(valid, rows_ce, 0).sum()
    return Sums(ce, torch.where(valid, rows_kl, 0).sum(), hidden_grad, weight_grad, bias_grad)


class LinearKD(torch.autograd.Function):
    """Autograd node of `linear_kd_loss`. It keeps gradients, never a weight: ZeRO-3 may free that."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        teacher_bias: Tensor | None,
        labels: Tensor,
        num_valid: Tensor,
        options: Options,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = compute_dtype(student_hidden)
        student = Head(student_weight, student_bias, options.vocab_size, dtype)
        teacher = None
        if options.gamma != 0 and teacher_hidden is not None and teacher_weight is not None:
            teacher = Head(teacher_weight, teacher_bias, options.vocab_size, dtype)
        sums = run_chunks(student_hidden, student, teacher_hidden, teacher, labels, options, needs)
        inverse = torch.where(num_valid > 0, num_valid, 1).double().reciprocal()
        ce, kl = sums.ce * inverse, sums.kl * inverse
        loss = ce + options.gamma * options.temperature**2 * kl
        ctx.save_for_backward(inverse, sums.hidden_grad, sums.weight_grad, sums.bias_grad)
        ctx.params = [
            None if tensor is None else (tensor.shape, tensor.dtype)
            for tensor in (student_hidden, student_weight, student_bias)
        ]
        ce, kl = ce.to(dtype), kl.to(dtype)
        ctx.mark_non_differentiable(ce, kl)
        return loss.to(dtype), ce, kl

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        inverse, *grads = ctx.saved_tensors
        scale = grad_outputs[0] * inverse
        results: list[Tensor | None] = []
        for grad, param in zip(grads, ctx.params, strict=True):
            if grad is None:
                results.append(None)
                continue
            shape, dtype = param
            result = grad.new_empty(shape, dtype=dtype)
            torch.mul(grad, scale.to(grad.dtype), out=result[: len(grad)])
            result[len(grad) :] = 0  # the padded rows of the head, if any
            results.append(result)
        return (*results, *(None,) * 7)
