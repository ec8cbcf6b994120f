"""The chunked loss head against full float64 logits: values and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddk_ds.kernels import Options, chunked, linear_nll, rows_eager
from ddk_ds.kernels.chunked import row_kernel
from ddk_ds.kernels.options import Engine, Rows
from ddk_ds.kernels.reference import reference_nll
from tests.unit.kernels.kd_case import ENGINES, assert_agrees, error, make, near, parts, truth


@pytest.mark.parametrize("std", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0, 4.0])
def test_float32_is_exact(std: float, temperature: float) -> None:
    case = make(150, 1003, (64, 96), std=std, temperature=temperature, bias=True)
    assert_agrees(case, 5e-7, 1e-6)


@pytest.mark.parametrize("num_tokens", [1, 32, 33])
@pytest.mark.parametrize("vocab_size", [1, 2, 257])
@pytest.mark.parametrize("chunk_tokens", [1, 16, 256])
def test_ragged_shapes(num_tokens: int, vocab_size: int, chunk_tokens: int) -> None:
    case = make(num_tokens, vocab_size, (7, 9), dtype=torch.float64, ignored=0.0, bias=True, temperature=1.5)
    if vocab_size == 1:  # one class: loss and gradient are 0, no relative error
        found = case.run(chunk_tokens=chunk_tokens)
        grads = torch.autograd.grad(found.loss, case.leaves())
        assert all(float(value.detach().abs().max()) < 1e-12 for value in (*parts(found), *grads))
    else:
        assert_agrees(case, 1e-12, 1e-12, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_blocks_of_rows_join(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    monkeypatch.setitem(rows_eager._BLOCK_ELEMENTS, "cpu", 5 * 211)
    case = make(dtype=torch.float64, temperature=temperature)
    assert_agrees(case, 1e-12, 1e-12, chunk_tokens=32, engine="eager")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_half_precision(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, temperature: float) -> None:
    monkeypatch.setattr(chunked, "TILE_ROWS", 512)  # the vocabulary is no multiple of it
    case = make(150, 1003, (64, 96), std=3.0, dtype=dtype, temperature=temperature, bias=True)
    # Logits and statistics are float32: the loss is exact for the inputs; the gradient is rounded once.
    assert_agrees(case, 5e-7, 5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("step", "kl_range"), [(0.02, (5e-4, 5e-3)), (0.006, (5e-5, 5e-4))])
def test_near_the_teacher(dtype: torch.dtype, step: float, kl_range: tuple[float, float]) -> None:
    case = near(200, step, dtype)
    expected, expected_grads = truth(case)
    assert kl_range[0] < float(expected.kl) < kl_range[1]
    found = case.run()
    assert error(found.loss, expected.loss) <= 1e-4
    assert error(found.kl, expected.kl) <= 1e-4
    for grad, want in zip(torch.autograd.grad(found.loss, case.leaves()), expected_grads, strict=True):
        assert error(grad, want) <= 5e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_the_row_kernel_keeps_the_digits_of_a_small_kl(engine: Engine) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(64, 1000, generator=generator)
    student = teacher + 0.005 * torch.randn(64, 1000, generator=generator)
    log_q, log_p = (torch.log_softmax(logits.double(), -1) for logits in (teacher, student))
    expected = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert 5e-6 < expected.mean().item() < 5e-5
    ce, kl = torch.empty(2, 64, dtype=torch.float64)
    options = Options(vocab_size=1000, gamma=1.0, engine=engine)
    kernel = row_kernel(student.device, student.dtype, options)
    kernel(Rows(student, teacher, torch.zeros(64, dtype=torch.int64), ce, kl, student), options)
    # sum(q r) in float32 is 1e-3 off here.
    assert error(kl.sum(), expected.sum()) < 1e-4
    assert (kl - expected).abs().max().item() < 1e-7


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
    case = make(4, 5, (2, 3), dtype=torch.float64, bias=True, padded=(1, 0), ignored=0.3)
    case = replace(case, temperature=temperature, gamma=gamma)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        moved = replace(case, student_hidden=hidden, student_weight=weight, student_bias=bias)
        return moved.run(chunk_tokens=3).loss

    assert torch.autograd.gradcheck(loss, (case.student_hidden, case.student_weight, case.student_bias))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_large_logits(temperature: float) -> None:
    case = make(std=1e4, temperature=temperature)
    found = case.run()
    grads = torch.autograd.grad(found.loss, case.leaves())
    assert all(bool(value.isfinite().all()) for value in (*parts(found), *grads))
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
    whole, chunks = case.run(), case.run(chunk_tokens=chunk_tokens)
    grads = [torch.autograd.grad(found.loss, case.leaves()) for found in (whole, chunks)]
    for a, b in zip((*parts(whole), *grads[0]), (*parts(chunks), *grads[1]), strict=True):
        assert error(a, b.double()) < 1e-6


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
        options=Options(211, gamma=0.0, chunk_tokens=chunk_tokens),
        bias=case.student_bias,
    )
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert not found[ignored].any()
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-6, atol=2e-6)


def test_linear_nll_sums_to_the_losss_ce() -> None:
    case = make()
    nll = linear_nll(case.student_hidden, case.student_weight, case.labels, options=Options(211, gamma=0.0))
    assert error(nll.sum() / case.num_valid, case.run().ce.double()) < 1e-6
