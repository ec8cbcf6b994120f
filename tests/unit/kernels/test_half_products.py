"""Products of bfloat16 matrices with float32 results on a CPU, and the head that uses them where it can."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ddk_ds.kernels import chunked, products_native, rows_native
from ddk_ds.kernels.chunked import has_fast_half
from ddk_ds.kernels.products_native import add_half_product, half_product, supports
from tests.unit.kernels.kd_case import assert_agrees, error, make, near, truth

HALF = torch.bfloat16
WEIGHT = torch.zeros(4, 2, dtype=HALF)
needs_products = pytest.mark.skipif(not supports(WEIGHT), reason="oneDNN has no such product on this processor")
# One token, one row of the head and the smallest width; then sizes around the blocks of 16, 32, 128 and 256.
SIZES = [(1, 1, 2), (5, 17, 6), (33, 257, 50), (64, 256, 64), (67, 600, 258)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(HALF)


def test_a_processor_that_multiplies_bfloat16_has_these_products() -> None:
    """A torch without the kernel would make the head two to four times as slow in silence."""
    assert supports(WEIGHT) or not has_fast_half(WEIGHT) or not torch.cpu._is_amx_tile_supported()


@needs_products
def test_intels_processors_without_amx_keep_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for intel in (True, False):
        monkeypatch.setattr(products_native, "_is_intel", lambda intel=intel: intel)
        assert supports(WEIGHT) is not intel


@needs_products
@pytest.mark.parametrize(("tokens", "vocab", "size"), SIZES)
def test_sums_are_as_exact_as_those_of_a_float32_product(tokens: int, vocab: int, size: int) -> None:
    hidden, weight, grad = (
        normal(tokens, size),
        normal(vocab, size, seed=1),
        normal(tokens, vocab + 5, seed=2)[:, :vocab],
    )
    logits = torch.full((tokens, vocab + 3), 7.0)
    half_product(hidden, weight, logits[:, :vocab])
    exact = hidden.double() @ weight.double().T
    naive = error(hidden.float() @ weight.float().T, exact)
    assert error(logits[:, :vocab], exact) <= 1.5 * naive + 1e-7
    assert (logits[:, vocab:] == 7).all()
    start = normal(vocab + 2, size, seed=3).float()
    product = grad.double().T @ hidden.double()
    naive = error(grad.float().T @ hidden.float(), product)
    for keep in (True, False):
        total = start.clone()
        add_half_product(grad, hidden, total[:vocab], keep=keep)
        assert error(total[:vocab], product + (start[:vocab] if keep else 0)) <= 1.5 * naive + 1e-7
        assert torch.equal(total[vocab:], start[vocab:])


@needs_products
def test_bits_do_not_depend_on_threads_calls_or_other_rows(two_threads: None) -> None:
    hidden, weight, grad = normal(40, 96), normal(700, 96, seed=1), normal(40, 700, seed=2)
    first, second = torch.empty(40, 700), torch.empty(40, 700)
    one, two = torch.empty(700, 96), torch.empty(700, 96)
    torch_product = hidden @ weight.T
    half_product(hidden, weight, first)
    add_half_product(grad, hidden, one, keep=False)
    assert torch.equal(hidden @ weight.T, torch_product)  # the matrix unit was given back
    torch.set_num_threads(1)
    half_product(hidden, weight, second)
    add_half_product(grad, hidden, two, keep=False)
    assert torch.equal(first, second) and torch.equal(one, two)
    half_product(hidden[7:8], weight, second[:1])
    assert torch.equal(second[:1], first[7:8])


@needs_products
def test_nan_and_infinity_show_in_their_own_sums_alone() -> None:
    hidden, weight = torch.ones(3, 4, dtype=HALF), torch.ones(5, 4, dtype=HALF)
    hidden[1, 2], weight[3, 1] = torch.nan, torch.inf
    logits = torch.empty(3, 5)
    half_product(hidden, weight, logits)
    assert logits[1].isnan().all() and torch.equal(logits[0], torch.tensor([4.0, 4, 4, torch.inf, 4]))


class _Spy:
    """The names of the products that the head computes, in their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for name in ("half_product", "add_half_product"):
            monkeypatch.setattr(chunked, name, self._noting(name, getattr(chunked, name)))

    def _noting(self, name: str, function: Any) -> Any:
        def noting(*arguments: Any, **options: Any) -> None:
            self.names.append(name)
            function(*arguments, **options)

        return noting


@needs_products
@pytest.mark.parametrize("rows", [False, True])
def test_the_head_takes_them_on_a_processor_that_multiplies_bfloat16(
    monkeypatch: pytest.MonkeyPatch, rows: bool
) -> None:
    spy = _Spy(monkeypatch)
    monkeypatch.setattr(chunked, "has_fast_half", lambda weight: weight.dtype == HALF)
    case = make(150, 507, (64, 96), std=3.0, dtype=HALF, bias=True, padded=(5, 0))
    valid = (case.labels != -100).nonzero().squeeze(1) if rows else None
    assert_agrees(case, 5e-7, 5e-3, chunk_tokens=16, valid_rows=valid)
    num_chunks = -(-len(case.labels if valid is None else valid) // 16)
    assert spy.names.count("half_product") == 2 * num_chunks
    assert spy.names.count("add_half_product") == -(-num_chunks // 4)
    spy.names.clear()
    monkeypatch.setattr(chunked, "has_fast_half", lambda weight: False)
    case.run(chunk_tokens=16)
    make(20).run()
    assert spy.names == []


@needs_products
def test_the_weights_gradient_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a float32 buffer only the logits' gradients are rounded, by at most 2^-9; rounded products add to that."""
    monkeypatch.setattr(chunked, "has_fast_half", lambda weight: weight.dtype == HALF)
    case, sums = make(150, 507, (64, 96), std=3.0, dtype=HALF), {}
    for products in (True, False):
        monkeypatch.setattr(products_native, "supports", lambda weight, products=products: products)
        buffer = torch.zeros(507, 64)
        case.run(weight_grad_buffer=buffer).loss.backward()
        sums[products] = error(buffer, truth(case)[1][1])
    assert sums[True] < 1.3e-3 < 1.6e-3 < sums[False] < 2**-8


@needs_products
def test_near_the_teacher_by_these_products(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = _Spy(monkeypatch)
    monkeypatch.setattr(chunked, "has_fast_half", lambda weight: weight.dtype == HALF)
    assert_agrees(near(200, 0.006, HALF), 1e-4, 5e-3)
    assert spy.names == ["half_product", "half_product", "add_half_product"]


def test_what_they_do_not_fit() -> None:
    for weight in (WEIGHT.float(), WEIGHT.half(), WEIGHT[:, :1], WEIGHT.repeat(1, 2)[:, ::2], WEIGHT.to("meta")):
        assert not supports(weight)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Forget before and after the test what this machine has."""
    caches = (products_native._works, products_native._addresses)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_torch_without_the_kernel(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    monkeypatch.setattr(products_native, "_MULTIPLY", "another_name")
    assert products_native._addresses() is None and not supports(WEIGHT)


def test_a_torch_that_is_another_library(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    assert rows_native.load() is not None  # before torch's is missing
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not supports(WEIGHT)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    monkeypatch.setattr(rows_native, "load", lambda: None)
    assert not supports(WEIGHT)


@needs_products
def test_a_onednn_that_is_switched_off(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    assert supports(WEIGHT)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with pytest.raises(RuntimeError, match="oneDNN refused a product of bfloat16 matrices"):
        half_product(WEIGHT, WEIGHT, torch.empty(4, 4))
    products_native._works.cache_clear()
    assert not supports(WEIGHT)
