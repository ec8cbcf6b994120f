"""The chunked distillation head against Eq. 3 on full float64 logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddk_ds.errors import ConfigError
from ddk_ds.kernels import KDLoss, linear_kd_loss, linear_nll
from ddk_ds.kernels.reference import reference_kd_loss, reference_nll

IGNORED = -100


@dataclass
class Case:
    """Inputs of one call; the students' tensors require gradients."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    vocab_size: int

    @property
    def params(self) -> list[Tensor]:
        tensors = (self.student_hidden, self.student_weight, self.student_bias)
        return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]

    def loss(self, *, exact: bool = False, **options: Any) -> KDLoss:
        """By the kernel, or by the float64 reference."""
        valid = (self.labels != IGNORED).sum()
        given = {"gamma": 0.7, "num_valid": valid, "vocab_size": self.vocab_size, **options}
        if not exact:
            given.setdefault("chunk_tokens", 16)
        return (reference_kd_loss if exact else linear_kd_loss)(
            self.student_hidden,
            self.student_weight,
            self.teacher_hidden,
            self.teacher_weight,
            self.labels,
            student_bias=self.student_bias,
            teacher_bias=self.teacher_bias,
            **given,
        )


def make_case(
    num_tokens: int = 37,
    vocab_size: int = 301,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    padding: tuple[int, int] = (0, 0),
    ignored: float = 0.2,
    scale: float = 1.0,
    seed: int = 0,
) -> Case:
    """Random heads whose logits have a deviation of about 2 * scale; hidden sizes 24 and 40."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = [vocab_size + extra for extra in padding]
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < ignored] = IGNORED
    tensors = [
        normal(num_tokens, 24),
        normal(rows[0], 24) * 2 * scale / math.sqrt(24),
        normal(num_tokens, 40),
        normal(rows[1], 40) * 2 * scale / math.sqrt(40),
        normal(rows[0]),
        normal(rows[1]),
    ]
    student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias = (
        tensor.to(dtype) for tensor in tensors
    )
    return Case(
        student_hidden.requires_grad_(),
        student_weight.requires_grad_(),
        teacher_hidden,
        teacher_weight,
        labels,
        student_bias.requires_grad_() if bias else None,
        teacher_bias if bias else None,
        vocab_size,
    )


def near_teacher(seed: int = 0) -> Case:
    """A bfloat16 student that is its teacher but for a little noise: KL about 1e-3."""
    case = make_case(dtype=torch.bfloat16, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(case.teacher_hidden.shape, generator=generator) * 0.022
    return replace(
        case,
        student_hidden=(case.teacher_hidden + noise).bfloat16().requires_grad_(),
        student_weight=case.teacher_weight.clone().requires_grad_(),
    )


def error(found: Tensor, expected: Tensor) -> float:
    """Distance over the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def values(loss: KDLoss) -> list[float]:
    """loss, ce and kl as numbers."""
    return [part.item() for part in loss]


def grads(case: Case, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(case.loss(**options).loss, case.params)


def exact_grads(case: Case, **options: Any) -> tuple[Tensor, ...]:
    """Gradients of the reference, kept in float64."""
    students = (case.student_hidden, case.student_weight, case.student_bias)
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in students]
    assert doubles[0] is not None and doubles[1] is not None
    double = replace(case, student_hidden=doubles[0], student_weight=doubles[1], student_bias=doubles[2])
    return torch.autograd.grad(double.loss(exact=True, **options).loss, double.params)


def check(case: Case, loss_error: float, grad_error: float, **options: Any) -> None:
    """The kernel's losses and gradients are those of the reference within the two relative errors."""
    expected_options = {key: value for key, value in options.items() if key != "chunk_tokens"}
    found, expected = case.loss(**options), case.loss(exact=True, **expected_options)
    for name, one, other in zip(KDLoss._fields, values(found), values(expected), strict=True):
        assert abs(one - other) <= loss_error * abs(other), name
    pairs = zip(
        torch.autograd.grad(found.loss, case.params), exact_grads(case, **expected_options), strict=True
    )
    for one, other in pairs:
        assert one.shape == other.shape
        assert error(one, other) <= grad_error


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0, 4.0])
def test_float32_is_exact(temperature: float, bias: bool) -> None:
    check(make_case(bias=bias), 5e-7, 1e-6, temperature=temperature)


@pytest.mark.parametrize(("dtype", "grad_error"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_half_precision_inputs(temperature: float, dtype: torch.dtype, grad_error: float) -> None:
    case = make_case(dtype=dtype, bias=True)
    check(case, 1e-6, grad_error, temperature=temperature)
    assert case.loss().loss.dtype == torch.float32
    assert {grad.dtype for grad in grads(case)} == {dtype}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_near_the_teacher(seed: int, temperature: float) -> None:
    case = near_teacher(seed)
    options = {"gamma": 1e3, "temperature": temperature}  # so much that the KL is most of the gradient
    found, expected = case.loss(**options), case.loss(exact=True, **options)
    assert 1e-4 < float(expected.kl) < 5e-3
    assert abs(float(found.kl) / float(expected.kl) - 1) <= 1e-4
    for one, other in zip(grads(case, **options), exact_grads(case, **options), strict=True):
        assert error(one, other) <= 5e-3


def test_at_the_teacher_the_kl_is_zero() -> None:
    case = make_case()
    same = replace(case, teacher_hidden=case.student_hidden, teacher_weight=case.student_weight)
    assert abs(float(same.loss().kl)) < 1e-7
    for one, other in zip(grads(same), grads(same, gamma=0.0), strict=True):
        assert error(one, other) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradcheck_in_float64(temperature: float) -> None:
    whole = make_case(5, 11, dtype=torch.float64, bias=True, padding=(2, 1))
    case = replace(  # fewer numbers to vary
        whole,
        student_hidden=whole.student_hidden[:, :3].detach().requires_grad_(),
        student_weight=whole.student_weight[:, :3].detach().requires_grad_(),
    )

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        moved = replace(case, student_hidden=hidden, student_weight=weight, student_bias=bias)
        return moved.loss(temperature=temperature, chunk_tokens=2).loss

    assert torch.autograd.gradcheck(loss, case.params)
    check(case, 1e-13, 1e-13, temperature=temperature)


@pytest.mark.parametrize(
    ("num_tokens", "vocab_size"), [(1, 1), (1, 7), (2, 4099), (15, 31), (16, 32), (17, 33), (130, 3)]
)
def test_ragged_shapes(num_tokens: int, vocab_size: int) -> None:
    case = make_case(num_tokens, vocab_size, ignored=0.0)
    if vocab_size == 1:  # one class: nothing to learn
        assert values(case.loss()) == [0, 0, 0]
        assert all(not grad.any() for grad in grads(case))
    else:
        check(case, 5e-7, 1e-6)


def test_half_precision_head_of_several_cast_tiles() -> None:
    check(make_case(9, 5000, dtype=torch.bfloat16, padding=(3, 0)), 1e-6, 5e-3)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 36, 37, 1000])
def test_chunk_size_does_not_matter(chunk_tokens: int) -> None:
    case = make_case(bias=True)
    check(case, 5e-7, 1e-6, chunk_tokens=chunk_tokens)
    for one, other in zip(grads(case, chunk_tokens=chunk_tokens), grads(case), strict=True):
        assert error(one, other) < 1e-6


def test_ignored_rows_get_no_gradient() -> None:
    case = make_case(ignored=0.5)
    hidden_grad = grads(case)[0]
    ignored = case.labels == IGNORED
    assert 0 < int(ignored.sum()) < len(ignored)
    assert not hidden_grad[ignored].any()
    assert hidden_grad[~ignored].any(-1).all()


@pytest.mark.parametrize("num_tokens", [0, 20])
def test_no_valid_token(num_tokens: int) -> None:
    case = make_case(num_tokens, ignored=1.1, bias=True)
    assert (case.labels == IGNORED).all()
    assert values(case.loss()) == [0, 0, 0]
    for grad, param in zip(grads(case), case.params, strict=True):
        assert grad.shape == param.shape
        assert not grad.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_what_ignored_rows_hold_is_harmless(gamma: float, bad: float) -> None:
    case = make_case(bias=True)
    ignored = (case.labels == IGNORED)[:, None]
    spoiled = replace(
        case,
        student_hidden=case.student_hidden.detach().masked_fill(ignored, bad).requires_grad_(),
        teacher_hidden=case.teacher_hidden.masked_fill(ignored, bad),
    )
    assert values(spoiled.loss(gamma=gamma)) == values(case.loss(gamma=gamma))
    for one, other in zip(grads(spoiled, gamma=gamma), grads(case, gamma=gamma), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["student_hidden", "teacher_hidden"])
def test_nan_in_a_valid_row_is_not_hidden(name: str) -> None:
    case = make_case()
    row = int((case.labels != IGNORED).nonzero()[0])
    hidden = getattr(case, name).detach().clone()
    hidden[row, 0] = math.nan
    assert math.isnan(replace(case, **{name: hidden}).loss().loss.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_takes_no_part(dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, bias=True, padding=(19, 7))
    assert case.student_bias is not None
    with torch.no_grad():
        for tensor in (case.student_weight, case.teacher_weight, case.student_bias):
            tensor[case.vocab_size :] = math.nan
    check(case, 1e-6, 1e-6 if dtype == torch.float32 else 5e-3)
    _, weight_grad, bias_grad = grads(case)
    assert not weight_grad[case.vocab_size :].any()
    assert not bias_grad[case.vocab_size :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_huge_logits_stay_finite(temperature: float, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, scale=3000.0)
    with torch.no_grad():
        assert float((case.student_hidden @ case.student_weight.t()).abs().max()) > 1e4
    found, expected = case.loss(temperature=temperature), case.loss(exact=True, temperature=temperature)
    assert values(found) == pytest.approx(values(expected), rel=1e-5)
    assert all(grad.isfinite().all() for grad in grads(case, temperature=temperature))


def test_gamma_zero_is_ce_and_never_touches_the_teacher() -> None:
    case = make_case()
    with_teacher = replace(
        case,
        teacher_hidden=torch.full_like(case.teacher_hidden, math.nan),
        teacher_weight=torch.full_like(case.teacher_weight, math.nan),
    )
    logits = case.student_hidden.double() @ case.student_weight.double().t()
    expected = torch.nn.functional.cross_entropy(logits, case.labels)
    found = with_teacher.loss(gamma=0.0)
    assert found.loss.item() == float(found.ce) == pytest.approx(expected.item(), rel=5e-7)
    assert float(found.kl) == 0
    without = linear_kd_loss(
        case.student_hidden,
        case.student_weight,
        None,
        None,
        case.labels,
        gamma=0.7,
        vocab_size=case.vocab_size,
        num_valid=(case.labels != IGNORED).sum(),
    )
    assert without.loss.item() == pytest.approx(expected.item(), rel=5e-7)
    for one, other in zip(
        grads(with_teacher, gamma=0.0), torch.autograd.grad(expected, case.params), strict=True
    ):
        assert error(one, other) <= 1e-6


def test_parts_add_up_and_are_detached() -> None:
    found = make_case().loss(gamma=0.7, temperature=2.0)
    assert found.loss.item() == pytest.approx(float(found.ce) + 0.7 * 4 * float(found.kl), rel=1e-6)
    assert (found.loss.requires_grad, found.ce.requires_grad, found.kl.requires_grad) == (True, False, False)


def test_sums_are_divided_by_num_valid() -> None:
    case = make_case()
    one, eight = (case.loss(num_valid=torch.tensor(count)) for count in (1, 8))
    assert one.loss.item() == pytest.approx(8 * eight.loss.item(), rel=1e-6)
    once, scaled = (torch.autograd.grad(loss, case.student_weight)[0] for loss in (one.loss, 8 * eight.loss))
    assert error(once, scaled) < 1e-6


@pytest.mark.parametrize("frozen", ["student_weight", "student_hidden", "student_bias"])
def test_frozen_tensor_gets_no_gradient(frozen: str) -> None:
    case = make_case(bias=True)
    full = {id(p): grad for p, grad in zip(case.params, grads(case), strict=True)}
    getattr(case, frozen).requires_grad_(False)
    assert len(case.params) == 2
    case.loss().loss.backward()
    assert getattr(case, frozen).grad is None
    assert all(torch.equal(param.grad, full[id(param)]) for param in case.params if param.grad is not None)
    assert all(param.grad is not None for param in case.params)


def test_teacher_gets_no_gradient() -> None:
    case = make_case()
    for tensor in (case.teacher_hidden, case.teacher_weight):
        tensor.requires_grad_()
    case.loss().loss.backward()
    assert case.teacher_hidden.grad is None
    assert case.teacher_weight.grad is None


def test_without_grad_the_loss_is_the_same() -> None:
    case = make_case()
    with torch.no_grad():
        found = case.loss().loss
    assert not found.requires_grad
    assert found.item() == case.loss().loss.item()


@pytest.mark.parametrize("chunk_tokens", [1, 16, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_linear_nll(dtype: torch.dtype, chunk_tokens: int) -> None:
    case = make_case(dtype=dtype, bias=True, padding=(5, 0))
    hidden, weight, options = case.student_hidden, case.student_weight, {"vocab_size": case.vocab_size}
    found = linear_nll(
        hidden, weight, case.labels, bias=case.student_bias, chunk_tokens=chunk_tokens, **options
    )
    expected = reference_nll(hidden, weight, case.labels, bias=case.student_bias, **options)
    assert (found.dtype, found.requires_grad) == (torch.float32, False)
    assert error(found, expected) <= 5e-7
    assert not found[case.labels == IGNORED].any()


def test_linear_nll_ignores_nan_in_ignored_rows_alone() -> None:
    case = make_case()
    ignored = case.labels == IGNORED
    for rows, spoiled in ((ignored, 0), (~ignored, int((~ignored).sum()))):
        hidden = case.student_hidden.detach().masked_fill(rows[:, None], math.nan)
        found = linear_nll(hidden, case.student_weight, case.labels, vocab_size=case.vocab_size)
        assert int(found.isnan().sum()) == spoiled


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"student_hidden": torch.ones(37)}, {}, r"student_hidden has shape \(37,\)"),
        ({"student_hidden": torch.ones(37, 25)}, {}, "same hidden size"),
        ({"student_hidden": torch.ones(37, 24, dtype=torch.float64)}, {}, "same dtype and device"),
        ({"student_weight": torch.ones(301, 24, dtype=torch.int64)}, {}, "student_weight has dtype"),
        ({"student_bias": torch.ones(300)}, {}, r"student_bias has shape \(300,\)"),
        ({"teacher_hidden": torch.ones(36, 40)}, {}, "teacher_hidden has 36 rows"),
        ({"teacher_hidden": torch.ones(37, 24)}, {}, "teacher_hidden has shape"),
        ({"teacher_weight": None}, {}, "teacher_hidden, teacher_weight: one is None"),
        ({"teacher_weight": torch.ones(300, 40)}, {}, "vocab_size is 301, teacher_weight has 300"),
        ({"labels": torch.zeros(37, dtype=torch.int32)}, {}, "labels are torch.int32"),
        ({"labels": torch.zeros(36, dtype=torch.int64)}, {}, r"must be int64 \(37,\)"),
        ({}, {"vocab_size": 302}, "vocab_size is 302"),
        ({}, {"vocab_size": 0}, "vocab_size is 0"),
        ({}, {"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({}, {"gamma": -1.0}, "gamma is -1"),
        ({}, {"gamma": math.nan}, "gamma is nan"),
        ({}, {"temperature": 0.0}, "temperature is 0"),
        ({}, {"temperature": math.inf}, "temperature is inf"),
        ({}, {"num_valid": torch.ones(2)}, "num_valid has shape"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(make_case(), **changes).loss(**options)


def test_bad_arguments_of_linear_nll_are_refused() -> None:
    hidden, weight, labels = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ConfigError, match="vocab_size is 6, weight has 5 rows"):
        linear_nll(hidden, weight, labels, vocab_size=6)
    with pytest.raises(ConfigError, match="labels are"):
        linear_nll(hidden, weight, labels[:2], vocab_size=5)
    with pytest.raises(ConfigError, match="chunk_tokens is 0"):
        linear_nll(hidden, weight, labels, vocab_size=5, chunk_tokens=0)
