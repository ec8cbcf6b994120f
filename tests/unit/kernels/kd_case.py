"""Arguments of the loss head for its tests, and the float64 truth to hold it against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ddk_ds.kernels import Divergence, KDLoss, LogitForm, Options, TeacherTopK, linear_kd_loss
from ddk_ds.kernels.options import Engine
from ddk_ds.kernels.reference import reference_kd_loss

# The Triton kernel runs under its interpreter where there is no GPU (tests/conftest.py).
PLAIN = LogitForm()
OPTIONS = tuple(field.name for field in fields(Options))
ENGINES: tuple[Engine, ...] = ("native", "eager", "triton")


@dataclass
class Case:
    """Arguments of the loss under the names of its signature, and options under those of `Options`."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    labels: Tensor
    num_valid: Tensor
    vocab_size: int
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    teacher_topk: TeacherTopK | None = None
    gamma: float = 0.5
    temperature: float = 1.0
    divergence: Divergence = "forward_kl"
    coefficient: float = 0.3
    ce_weight: float = 1.0
    student_form: LogitForm = PLAIN
    teacher_form: LogitForm = PLAIN

    def run(self, loss: Callable[..., KDLoss] = linear_kd_loss, **changes: Any) -> KDLoss:
        """Call `loss` with these values, except those in `changes`: any argument of the loss or field of `Options`."""
        values = {**vars(self), **changes}
        options = Options(**{name: values.pop(name) for name in OPTIONS if name in values})
        return loss(**values, options=options)

    def leaves(self) -> list[Tensor]:
        tensors = (self.student_hidden, self.student_weight, self.student_bias)
        return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]


def make(
    num_tokens: int = 67,
    vocab_size: int = 211,
    hidden: tuple[int, int] = (24, 40),
    *,
    std: float = 2.0,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    padded: tuple[int, int] = (0, 0),
    ignored: float = 0.2,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Make random logits of standard deviation `std`; `padded` extra rows in the student's and teacher's head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    (hs, ht), (ps, pt) = hidden, padded
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < ignored] = -100
    return Case(
        normal(num_tokens, hs).to(dtype).requires_grad_(),
        (normal(vocab_size + ps, hs) * std / hs**0.5).to(dtype).requires_grad_(),
        normal(num_tokens, ht).to(dtype),
        (normal(vocab_size + pt, ht) * std / ht**0.5).to(dtype),
        labels,
        (labels != -100).sum(),
        vocab_size,
        normal(vocab_size + ps).to(dtype).requires_grad_() if bias else None,
        normal(vocab_size + pt).to(dtype) if bias else None,
        **options,
    )


def rows_for(engine: Engine, rows: int) -> int:
    """Return a number of rows: Triton's interpreter takes seconds for 100, and runs the same program for each."""
    return min(rows, 9) if engine == "triton" else rows


def near(num_tokens: int, step: float, dtype: torch.dtype) -> Case:
    """Make a student that differs from its teacher by a step in its hidden states; the gradient is the KL's alone."""
    case = make(num_tokens, 1024, (64, 64), std=3.0, dtype=dtype, gamma=1e4)
    hidden = case.student_hidden.detach().double()
    generator = torch.Generator().manual_seed(1)
    moved = hidden + step * torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    return replace(case, teacher_hidden=moved.to(dtype), teacher_weight=case.student_weight.detach())


def truth(case: Case) -> tuple[KDLoss, list[Tensor]]:
    """Compute loss and gradients from float64 copies, so that the gradients too are free of rounding."""
    copies = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        for name, value in vars(case).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    exact = replace(case, **copies)
    loss = exact.run(reference_kd_loss)
    return loss, list(torch.autograd.grad(loss.loss, exact.leaves()))


def parts(found: KDLoss) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, CE and divergence."""
    return found.loss, found.ce, found.kl


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error in norm."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def assert_agrees(case: Case, loss_bound: float, grad_bound: float, **options: Any) -> None:
    expected, expected_grads = truth(case)
    found = case.run(**options)
    for name, value, want in zip(KDLoss._fields, parts(found), parts(expected), strict=False):
        # 1e-14: what the definition itself loses in float64 where a divergence is small.
        assert abs(value.item() - want.item()) <= loss_bound * abs(want.item()) + 1e-14, name
    assert found.loss.requires_grad
    assert not found.ce.requires_grad
    assert not found.kl.requires_grad
    leaves = case.leaves()
    for leaf, grad, want in zip(leaves, torch.autograd.grad(found.loss, leaves), expected_grads, strict=True):
        assert grad.dtype == leaf.dtype
        assert grad.shape == leaf.shape
        assert error(grad, want) <= grad_bound
