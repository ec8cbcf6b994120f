"""The chunked loss head against full float64 logits: values, gradients, masks, and what it must not touch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddk_ds.errors import ConfigError
from ddk_ds.kernels import KDLoss, linear_kd_loss, linear_nll
from ddk_ds.kernels import chunked
from ddk_ds.kernels.reference import reference_kd_loss, reference_nll


@dataclass
class Case:
    """Arguments of the loss, in the order and under the names of its signature."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    labels: Tensor
    num_valid: Tensor
    vocab_size: int
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    gamma: float = 0.5
    temperature: float = 1.0

    def run(self, loss: Callable[..., KDLoss] = linear_kd_loss, **options: Any) -> KDLoss:
        return loss(**vars(self), **options)

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
    """Random logits of standard deviation `std`; `padded` extra rows in the student's and teacher's head."""
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


def near(num_tokens: int, step: float, dtype: torch.dtype) -> Case:
    """A student that is its teacher but for a step in its hidden states; the gradient is the KL's alone."""
    case = make(num_tokens, 1024, (64, 64), std=3.0, dtype=dtype, gamma=1e4)
    moved = case.student_hidden.detach().double()
    moved += step * torch.randn(moved.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return replace(case, teacher_hidden=moved.to(dtype), teacher_weight=case.student_weight.detach())


def truth(case: Case) -> tuple[KDLoss, list[Tensor]]:
    """Loss and gradients from float64 copies, so that the gradients too are free of rounding."""
    copies = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        for name, value in vars(case).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    exact = replace(case, **copies)
    loss = exact.run(reference_kd_loss)
    return loss, list(torch.autograd.grad(loss.loss, exact.leaves()))


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error in norm."""
    return float((found.double() - expected).norm() / expected.norm())


def assert_agrees(case: Case, loss_bound: float, grad_bound: float, **options: Any) -> None:
    expected, expected_grads = truth(case)
    found = case.run(**options)
    for name in KDLoss._fields:
        value, want = getattr(found, name), getattr(expected, name)
        assert abs(float(value) - float(want)) <= loss_bound * max(abs(float(want)), 1e-30), name
    assert found.loss.requires_grad
    assert not found.ce.requires_grad
    assert not found.kl.requires_grad
    leaves = case.leaves()
    for leaf, grad, want in zip(leaves, torch.autograd.grad(found.loss, leaves), expected_grads, strict=True):
        assert grad.dtype == leaf.dtype
        assert grad.shape == leaf.shape
        assert error(grad, want) <= grad_bound


@pytest.mark.parametrize("std", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0, 4.0])
def test_float32_is_exact(std: float, temperature: float) -> None:
    case = make(300, 2003, (64, 96), std=std, temperature=temperature, bias=True)
    assert_agrees(case, 5e-7, 1e-6)


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 67])
@pytest.mark.parametrize("vocab_size", [1, 2, 33, 257])
@pytest.mark.parametrize("chunk_tokens", [1, 16, 256])
def test_ragged_shapes(num_tokens: int, vocab_size: int, chunk_tokens: int) -> None:
    case = make(num_tokens, vocab_size, (7, 9), dtype=torch.float64, ignored=0.0, bias=True, temperature=1.5)
    if vocab_size == 1:  # one class: loss and gradient are 0, no relative error
        found = case.run(chunk_tokens=chunk_tokens)
        grads = torch.autograd.grad(found.loss, case.leaves())
        assert all(float(value.detach().abs().max()) < 1e-12 for value in (*found, *grads))
    else:
        assert_agrees(case, 1e-12, 1e-12, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_blocks_of_rows_join(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    monkeypatch.setattr(chunked, "CPU_BLOCK_ELEMENTS", 5 * 211)
    assert_agrees(make(dtype=torch.float64, temperature=temperature), 1e-12, 1e-12, chunk_tokens=32)


@pytest.mark.parametrize("padded", [(0, 45), (45, 0), (13, 45)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_rows_take_no_part(padded: tuple[int, int], dtype: torch.dtype) -> None:
    case = make(padded=padded, dtype=dtype, bias=True)
    grads = torch.autograd.grad(case.run().loss, case.leaves())
    assert not grads[1][211:].any()
    assert not grads[2][211:].any()
    with torch.no_grad():  # whatever the padding holds
        case.student_weight[211:] = float("nan")
        case.teacher_weight[211:] = float("nan")
    again = torch.autograd.grad(case.run().loss, case.leaves())
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    assert_agrees(make(padded=padded, dtype=dtype, bias=True), 1e-6, 5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_half_precision(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, temperature: float) -> None:
    monkeypatch.setattr(chunked, "CAST_TILE_ROWS", 512)  # the vocabulary is no multiple of it
    case = make(300, 2003, (64, 96), std=3.0, dtype=dtype, temperature=temperature, bias=True)
    # Logits and statistics are float32: the loss is exact for the inputs; the gradient is rounded once.
    assert_agrees(case, 5e-7, 2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("step", "kl_range"), [(0.02, (5e-4, 5e-3)), (0.006, (5e-5, 5e-4))])
def test_near_the_teacher(dtype: torch.dtype, step: float, kl_range: tuple[float, float]) -> None:
    case = near(300, step, dtype)
    expected, expected_grads = truth(case)
    assert kl_range[0] < float(expected.kl) < kl_range[1]
    found = case.run()
    assert error(found.loss, expected.loss) <= 1e-4
    assert error(found.kl, expected.kl) <= 1e-4
    for grad, want in zip(torch.autograd.grad(found.loss, case.leaves()), expected_grads, strict=True):
        assert error(grad, want) <= 5e-3


def test_the_teacher_itself_has_no_divergence() -> None:
    case = near(64, 0.0, torch.float32)
    found = case.run()
    assert float(found.kl) == pytest.approx(0, abs=1e-8)
    ce_alone = replace(case, gamma=0.0)
    for a, b in zip(
        torch.autograd.grad(found.loss, case.leaves()),
        torch.autograd.grad(ce_alone.run().loss, case.leaves()),
        strict=True,
    ):
        assert error(a, b.double()) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_gradcheck(temperature: float, gamma: float) -> None:
    case = make(5, 7, (3, 4), dtype=torch.float64, bias=True, padded=(2, 1), ignored=0.3)
    case = replace(case, temperature=temperature, gamma=gamma)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        moved = replace(case, student_hidden=hidden, student_weight=weight, student_bias=bias)
        return moved.run(chunk_tokens=2).loss

    assert torch.autograd.gradcheck(loss, (case.student_hidden, case.student_weight, case.student_bias))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_large_logits(temperature: float) -> None:
    case = make(std=1e4, temperature=temperature)
    found = case.run()
    grads = torch.autograd.grad(found.loss, case.leaves())
    assert all(bool(value.isfinite().all()) for value in (*found, *grads))
    assert_agrees(case, 1e-5, 1e-2)


def test_a_constant_added_to_a_models_logits_changes_nothing() -> None:
    case = near(64, 0.006, torch.float64)
    plain = case.run()
    shifted = replace(case, student_bias=torch.full((1024,), 50.0, dtype=torch.float64)).run()
    assert error(shifted.kl, plain.kl.double()) < 1e-9
    single = near(64, 0.006, torch.float32)
    shifted = replace(single, student_bias=torch.full((1024,), 50.0)).run()
    assert error(shifted.kl, plain.kl.double()) < 5e-3  # float32 logits of 50 have an error of 2e-6


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 1000])
def test_the_chunk_size_is_no_matter(chunk_tokens: int) -> None:
    case = make(temperature=2.0, bias=True)
    whole, parts = case.run(), case.run(chunk_tokens=chunk_tokens)
    grads = [torch.autograd.grad(found.loss, case.leaves()) for found in (whole, parts)]
    for a, b in zip((*whole, *grads[0]), (*parts, *grads[1]), strict=True):
        assert error(a, b.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_ignored_rows_may_hold_nan(dtype: torch.dtype, gamma: float) -> None:
    case = make(dtype=dtype, gamma=gamma, bias=True)
    clean, clean_grads = truth(case)
    ignored = case.labels == -100
    with torch.no_grad():
        case.student_hidden[ignored] = float("nan")
        case.teacher_hidden[ignored] = float("inf")
    found = case.run()
    grads = torch.autograd.grad(found.loss, case.leaves())
    assert error(found.loss, clean.loss) < 1e-6
    assert not grads[0][ignored].any()
    for grad, want in zip(grads, clean_grads, strict=True):
        assert error(grad, want) < 5e-3


@pytest.mark.parametrize("which", ["student_hidden", "teacher_hidden"])
def test_nan_in_a_valid_row_shows(which: str) -> None:
    case = make()
    row = int((case.labels != -100).nonzero()[3])
    with torch.no_grad():
        getattr(case, which)[row, 0] = float("nan")
    found = case.run()
    assert found.loss.isnan()
    assert found.kl.isnan()


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_nothing_valid_is_a_loss_of_zero(gamma: float) -> None:
    case = make(ignored=1.1, gamma=gamma, bias=True)
    assert int(case.num_valid) == 0
    found = case.run()
    assert [float(value) for value in found] == [0.0, 0.0, 0.0]
    grads = torch.autograd.grad(found.loss, case.leaves())
    assert not any(grad.any() for grad in grads)


def test_no_tokens_are_a_loss_of_zero() -> None:
    case = make(0)
    found = case.run()
    assert float(found.loss) == 0
    assert not torch.autograd.grad(found.loss, case.leaves())[1].any()


def test_the_divisor_is_the_callers() -> None:
    case = make()
    plain = case.run()
    # Half the valid count of one token over two ranks: not raised to 1.
    other = replace(case, num_valid=torch.tensor(0.5)).run()
    scale = 2 * int(case.num_valid)
    for a, b in zip(plain, other, strict=True):
        assert error(b, a.double() * scale) < 1e-6
    a = torch.autograd.grad(plain.loss, case.leaves())
    b = torch.autograd.grad(other.loss, case.leaves())
    assert error(b[1], a[1].double() * scale) < 1e-6


def test_another_ignore_index() -> None:
    case = make()
    expected = case.run()
    renamed = replace(case, labels=torch.where(case.labels == -100, -1, case.labels))
    assert torch.equal(renamed.run(ignore_index=-1).loss, expected.loss)


def test_a_label_outside_the_vocabulary_is_an_error() -> None:
    for label in (211, -1):
        case = make(padded=(30, 30))
        case.labels[0] = label
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            case.run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_scales_and_may_run_twice(dtype: torch.dtype) -> None:
    case = make(dtype=dtype)
    loss = case.run().loss
    once = torch.autograd.grad(loss, case.leaves(), retain_graph=True)
    thrice = torch.autograd.grad(loss * 3.0, case.leaves(), retain_graph=True)
    again = torch.autograd.grad(loss, case.leaves())
    for a, b, c in zip(once, thrice, again, strict=True):
        assert torch.equal(a, c)
        assert error(b, a.double() * 3) < (1e-6 if dtype == torch.float32 else 5e-3)


def test_only_what_needs_a_gradient_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(bias=True)
    expected = torch.autograd.grad(case.run().loss, case.leaves())
    needs = []
    run_chunks = chunked.run_chunks

    def spy(*arguments: Any) -> chunked.Sums:
        sums = run_chunks(*arguments)
        grads = (sums.hidden_grad, sums.weight_grad, sums.bias_grad)
        needs.append([grad is not None for grad in grads])
        return sums

    monkeypatch.setattr(chunked, "run_chunks", spy)
    names = ("student_hidden", "student_weight", "student_bias")
    for kept in range(3):
        frozen = {name: getattr(case, name).detach() for i, name in enumerate(names) if i != kept}
        part = replace(case, **frozen)
        (grad,) = torch.autograd.grad(part.run().loss, part.leaves())
        assert torch.equal(grad, expected[kept])
    with torch.no_grad():
        assert not case.run().loss.requires_grad
    assert needs == [[True, False, False], [False, True, False], [False, False, True], [False] * 3]


def test_the_teacher_gets_no_gradient() -> None:
    case = make()
    case.teacher_hidden.requires_grad_()
    case.teacher_weight.requires_grad_()
    case.run().loss.backward()
    assert case.teacher_hidden.grad is None
    assert case.teacher_weight.grad is None


def test_without_gamma_the_teacher_is_not_touched() -> None:
    case = make(gamma=0.0)
    poisoned = replace(
        case,
        teacher_hidden=torch.full_like(case.teacher_hidden, float("nan")),
        teacher_weight=torch.full_like(case.teacher_weight, float("nan")),
    )
    absent = replace(case, teacher_hidden=None, teacher_weight=None, gamma=0.5)
    results = [c.run() for c in (case, poisoned, absent)]
    for found in results:
        assert torch.equal(found.loss, results[0].loss)
        assert torch.equal(found.loss, found.ce)
        assert float(found.kl) == 0
    assert_agrees(case, 5e-7, 1e-6)


def test_no_weight_is_kept_for_the_backward_pass() -> None:
    case = make()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = case.run().loss
    expected = torch.autograd.grad(loss, case.leaves(), retain_graph=True)
    inputs = {tensor.data_ptr() for tensor in vars(case).values() if isinstance(tensor, Tensor)}
    assert kept
    assert not inputs & {tensor.data_ptr() for tensor in kept}
    with torch.no_grad():  # what ZeRO-3 does to a gathered weight after the call
        case.student_weight.fill_(float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, case.leaves()), expected, strict=True))


def test_no_tensor_of_all_tokens_by_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor))
            return out

    case = make(640, 1000, (8, 8), temperature=2.0)
    with Watch():
        case.run(chunk_tokens=32).loss.backward()
    assert max(sizes) == 2 * 32 * 1000  # both models' logits of one chunk


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [1, 16, 256])
def test_linear_nll(dtype: torch.dtype, chunk_tokens: int) -> None:
    case = make(dtype=dtype, padded=(45, 0), bias=True, std=3.0)
    ignored = case.labels == -100
    expected = reference_nll(
        case.student_hidden, case.student_weight, case.labels, vocab_size=211, bias=case.student_bias
    )
    with torch.no_grad():
        case.student_hidden[ignored] = float("nan")
    found = linear_nll(
        case.student_hidden,
        case.student_weight,
        case.labels,
        vocab_size=211,
        bias=case.student_bias,
        chunk_tokens=chunk_tokens,
    )
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert not found[ignored].any()
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-6, atol=2e-6)


def test_linear_nll_sums_to_the_losss_ce() -> None:
    case = make()
    nll = linear_nll(case.student_hidden, case.student_weight, case.labels, vocab_size=211)
    assert error(nll.sum() / case.num_valid, case.run().ce.double()) < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": -0.1}, "gamma is -0.1"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"vocab_size": 212}, "vocab_size is 212, student_weight has 211 rows"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"teacher_weight": torch.zeros(210, 40)}, "vocab_size is 211, teacher_weight has 210 rows"),
        ({"teacher_weight": None}, "teacher_hidden, teacher_weight: one is None"),
        ({"teacher_weight": torch.zeros(211, 41)}, r"teacher_hidden has shape \(67, 40\), teacher_weight \(211, 41\)"),
        ({"teacher_hidden": torch.zeros(66, 40)}, "teacher_hidden has 66 rows"),
        ({"teacher_bias": torch.zeros(3)}, r"teacher_bias has shape \(3,\): it must be \(211,\)"),
        ({"student_hidden": torch.zeros(67, 24, 1)}, "student_hidden has shape"),
        ({"student_hidden": torch.zeros(67, 24).bfloat16()}, "student_hidden is torch.bfloat16"),
        ({"student_weight": torch.zeros(211, 24, dtype=torch.int64)}, "student_weight has dtype torch.int64"),
        ({"student_bias": torch.zeros(211, 1)}, "student_bias has shape"),
        ({"labels": torch.zeros(67, dtype=torch.int32)}, "labels are torch.int32"),
        ({"labels": torch.zeros(66, dtype=torch.int64)}, r"labels are torch.int64 \(66,\)"),
        ({"num_valid": torch.ones(2)}, r"num_valid has shape \(2,\)"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {**vars(make()), **changes}
    with pytest.raises(ConfigError, match=message):
        linear_kd_loss(**arguments)


def test_linear_nll_refuses_bad_arguments() -> None:
    case = make()
    with pytest.raises(ConfigError, match="vocab_size is 999, weight has 211 rows"):
        linear_nll(case.student_hidden, case.student_weight, case.labels, vocab_size=999)
    with pytest.raises(ConfigError, match="chunk_tokens is -1"):
        linear_nll(case.student_hidden, case.student_weight, case.labels, vocab_size=211, chunk_tokens=-1)
