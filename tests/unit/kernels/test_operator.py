"""The operator around the loss: torch.compile, options, a buffer for gradients, rows left out, losses by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddk_ds.errors import ConfigError
from ddk_ds.kernels import LogitForm, Options, TeacherTopK, chunked, default_chunk_tokens, rows_native
from ddk_ds.kernels.options import Engine, Rows
from ddk_ds.kernels.rows_eager import eager_rows
from tests.unit.kernels.kd_case import OPTIONS, assert_agrees, error, make, truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_sees_one_operator(dtype: torch.dtype) -> None:
    case = make(dtype=dtype)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        bent = torch.tanh(hidden) * 1.5
        return replace(case, student_hidden=bent, student_weight=weight).run().loss * 2.0

    expected = torch.autograd.grad(loss(case.student_hidden, case.student_weight), case.leaves())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(case.student_hidden, case.student_weight), case.leaves())
    for a, b in zip(found, expected, strict=True):
        assert error(a, b.double()) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_the_operator_keeps_its_promises(bias: bool) -> None:
    case = make(20, 50, (8, 8), bias=bias)
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = []
    operator = torch.ops.ddk_ds.linear_kd.default

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is operator:
                calls.append((tuple(a.detach() if isinstance(a, Tensor) else a for a in args), kwargs))
            return func(*args, **(kwargs or {}))

    with Spy():
        case.run()
    # Schema, shapes without data, and that nothing given is changed.
    torch.library.opcheck(operator, *calls[0], test_utils=("test_schema", "test_faketensor"))


def test_every_option_reaches_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "vocab_size": 211,
        "gamma": 0.7,
        "temperature": 1.5,
        "divergence": "skew_reverse_kl",
        "coefficient": 0.2,
        "ce_weight": 0.9,
        "scale_by_temperature": False,
        "ignore_index": -7,
        "chunk_tokens": 16,
        "logits_dtype": "model",
        "student_form": LogitForm(0.5, 30.0),
        "teacher_form": LogitForm(1.5, 20.0),
        "engine": "eager",
    }
    assert set(options) == set(OPTIONS)
    seen = []

    def spy(given: Rows, options: Options) -> None:
        seen.append(options)
        eager_rows(given, options)

    monkeypatch.setattr(chunked, "eager_rows", spy)
    make(ignored=0.0).run(**options)
    assert set(seen) == {Options(**options)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_gradient_may_go_to_a_buffer(dtype: torch.dtype) -> None:
    case = make(dtype=dtype, padded=(3, 0))
    _, expected = truth(case)
    buffer = torch.full_like(case.student_weight, 0.5, dtype=torch.float32).detach()
    hidden = case.student_hidden.detach().requires_grad_()
    moved = replace(case, student_hidden=hidden)
    for _ in range(2):  # two micro-batches
        moved.run(weight_grad_buffer=buffer).loss.backward()
    assert case.student_weight.grad is None
    # In float32 over micro-batches and chunks, though a matmul's factors may have been rounded.
    assert error((buffer - 0.5) / 2, expected[1]) < (1e-5 if dtype == torch.float32 else 5e-3)


def test_rows_may_be_left_out() -> None:
    case = make(dtype=torch.float64, bias=True, temperature=2.0)
    with torch.no_grad():
        case.student_hidden[case.labels == -100] = float("nan")
    rows = (case.labels != -100).nonzero().squeeze(1)
    whole, part = case.run(per_token=True), case.run(per_token=True, valid_rows=rows, chunk_tokens=16)
    for name in ("loss", "ce", "kl", "token_ce", "token_kl"):
        assert error(getattr(part, name), getattr(whole, name)) < 1e-12
    for a, b in zip(*(torch.autograd.grad(found.loss, case.leaves()) for found in (part, whole)), strict=True):
        assert error(a, b) < 1e-12


def test_losses_by_token_sum_to_the_loss() -> None:
    case = make(temperature=2.0, gamma=0.7)
    found = case.run(per_token=True)
    assert found.token_ce is not None and found.token_kl is not None
    assert found.token_ce.shape == found.token_kl.shape == case.labels.shape
    assert not found.token_ce[case.labels == -100].any()
    total = found.token_ce.sum() + 0.7 * 4 * found.token_kl.sum()
    assert error(total, found.loss.double()) < 1e-6
    assert case.run().token_ce is None


def test_without_cross_entropy() -> None:
    case = make(bias=True, ce_weight=0.0)
    assert_agrees(case, 5e-7, 1e-6)
    assert float(case.run().ce) == 0


@pytest.mark.parametrize("scaled", [True, False])
def test_the_temperatures_square_is_a_choice(scaled: bool) -> None:
    case = make(temperature=3.0)
    found = case.run(scale_by_temperature=scaled)
    assert error(found.loss, (found.ce + 0.5 * (9 if scaled else 1) * found.kl).double()) < 1e-6
    plain = replace(case, gamma=0.5 if scaled else 0.5 / 9)
    assert error(found.loss, plain.run().loss.double()) < 1e-6


def test_logits_in_the_models_dtype_are_rounded() -> None:
    case = make(200, 1000, (64, 64), dtype=torch.bfloat16, std=3.0)
    _, expected = truth(case)
    grads = torch.autograd.grad(case.run(logits_dtype="model").loss, case.leaves())
    for grad, want in zip(grads, expected, strict=True):
        assert error(grad, want) < 2e-2


def test_chunks_are_chosen_by_vocabulary_and_device() -> None:
    assert default_chunk_tokens(32_000, "cpu") == 512
    assert default_chunk_tokens(151_936, "cpu") == 512
    # Both models' float32 logits of a chunk and the bf16 gradients of a group of chunks stay under 1.3 GB, as long as
    # that leaves tokens enough for a matmul.
    assert default_chunk_tokens(262_144, "cuda") == 512
    for vocab_size in (32_000, 50_257, 151_936):
        assert (2 * 4 + 4 * 2) * vocab_size * default_chunk_tokens(vocab_size, "cuda") < 1.3e9
    assert default_chunk_tokens(151_936, "cuda") == 512


@pytest.mark.parametrize("engine", ["native", "eager", "triton"])
@pytest.mark.parametrize("rows", [False, True])
def test_half_precision_gradients_of_several_chunks(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, rows: bool
) -> None:
    """On a GPU, or a CPU that multiplies bfloat16, gradients of 4 chunks of float32 logits go through one matmul."""
    monkeypatch.setattr(chunked, "has_fast_half", lambda weight: weight.dtype == torch.bfloat16)
    case = make(150, 507, (64, 96), std=3.0, dtype=torch.bfloat16, bias=True, padded=(5, 0))
    valid = (case.labels != -100).nonzero().squeeze(1) if rows else None
    assert_agrees(case, 5e-7, 5e-3, engine=engine, chunk_tokens=16, valid_rows=valid)


def test_a_missing_compiler_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    rows_native.load.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="install g\\+\\+") as caught:
            case = make()
            first, second = case.run(), case.run()
        assert len(caught) == 1
        assert torch.equal(first.loss, second.loss)
        with pytest.raises(ConfigError, match="engine is 'native'"):
            case.run(engine="native")
    finally:
        rows_native.load.cache_clear()


def top_k(num_rows: int, log_probs: tuple[int, ...], log_tail: tuple[int, ...]) -> TeacherTopK:
    ids = torch.zeros(num_rows, 4, dtype=torch.int64)
    return TeacherTopK(ids, torch.zeros(log_probs), torch.zeros(log_tail))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "kl"}, "divergence is 'kl': give one of forward_kl, "),
        ({"divergence": "jensen_shannon", "coefficient": 1.0}, "coefficient is 1.0"),
        ({"ce_weight": -1.0}, "ce_weight is -1.0"),
        ({"logits_dtype": "float64"}, "logits_dtype is 'float64'"),
        ({"student_form": LogitForm(1.0, -3.0)}, "student_form is LogitForm"),
        ({"valid_rows": torch.ones(3)}, "valid_rows is torch.float32"),
        ({"weight_grad_buffer": torch.zeros(3, 3)}, "weight_grad_buffer is torch.float32"),
        ({"teacher_topk": top_k(67, (67, 4), (67,))}, "give one of them"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make().run(**changes)


def test_a_teachers_top_k_must_fit() -> None:
    case = replace(make(), teacher_hidden=None, teacher_weight=None)
    with pytest.raises(ConfigError, match=r"teacher_topk.ids has 66 rows"):
        replace(case, teacher_topk=top_k(66, (66, 4), (66,))).run()
    for log_probs, log_tail in (((67, 3), (67,)), ((67, 4), (67, 1)), ((67, 4), (66,))):
        with pytest.raises(ConfigError, match=r"give int64 \(n, k\), \(n, k\) and \(n,\)"):
            replace(case, teacher_topk=top_k(67, log_probs, log_tail)).run()


def test_engines_are_named() -> None:
    assert chunked.triton_rows is not None
    with pytest.raises(ConfigError, match="engine is 'cuda'"):
        make().run(engine="cuda")
