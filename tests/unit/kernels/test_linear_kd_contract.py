"""The chunked loss head: what is masked, what it must not touch or keep, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddk_ds.errors import ConfigError
from ddk_ds.kernels import Options, chunked, linear_nll
from ddk_ds.kernels.chunked import Call, HeadInput, Wanted, run_chunks
from ddk_ds.kernels.options import Engine
from ddk_ds.kernels.reference import reference_kd_loss
from tests.unit.kernels.kd_case import assert_agrees, error, make, parts, truth


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
    assert [value.item() for value in parts(found)] == [0.0, 0.0, 0.0]
    grads = torch.autograd.grad(found.loss, case.leaves())
    assert not any(grad.any() for grad in grads)


def test_no_tokens_are_a_loss_of_zero() -> None:
    case = make(0)
    found = case.run()
    assert found.loss.item() == 0
    assert not torch.autograd.grad(found.loss, case.leaves())[1].any()


def test_the_divisor_is_the_callers() -> None:
    case = make()
    plain = case.run()
    # Half the valid count of one token over two ranks: not raised to 1.
    other = replace(case, num_valid=torch.tensor(0.5)).run()
    scale = 2 * int(case.num_valid)
    for a, b in zip(parts(plain), parts(other), strict=True):
        assert error(b, a.double() * scale) < 1e-6
    a = torch.autograd.grad(plain.loss, case.leaves())
    b = torch.autograd.grad(other.loss, case.leaves())
    assert error(b[1], a[1].double() * scale) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("rows", [False, True])
def test_weights_of_rows(dtype: torch.dtype, bound: float, rows: bool) -> None:
    """By definition: the gradient of sum_i w_i l_i, from the reference's losses of single tokens in float64."""
    case = make(dtype=dtype, bias=True)
    weights = torch.rand(67, generator=torch.Generator().manual_seed(3)) * 4
    exact = replace(
        case,
        **{
            name: tensor.detach().double().requires_grad_(tensor.requires_grad)
            for name, tensor in vars(case).items()
            if isinstance(tensor, Tensor) and tensor.is_floating_point()
        },
    )
    each = [
        replace(exact, labels=torch.where(torch.arange(67) == row, case.labels, -100)).run(reference_kd_loss).loss
        for row in range(67)
    ]
    expected = torch.dot(torch.stack(each), weights.double())
    valid = {"valid_rows": (case.labels != -100).nonzero().flatten()} if rows else {}
    found = case.run(row_weights=weights, chunk_tokens=16, **valid)
    assert error(found.loss, expected) < 1e-6
    right = torch.autograd.grad(expected, exact.leaves())
    for grad, want in zip(torch.autograd.grad(found.loss, case.leaves()), right, strict=True):
        assert error(grad, want) < bound
    with pytest.raises(ConfigError, match=r"row_weights are torch.float32 \(66,\)"):
        case.run(row_weights=weights[1:])


def test_another_ignore_index() -> None:
    case = make()
    expected = case.run()
    renamed = replace(case, labels=torch.where(case.labels == -100, -1, case.labels))
    assert torch.equal(renamed.run(ignore_index=-1).loss, expected.loss)


def test_a_label_outside_the_vocabulary_is_an_error() -> None:
    for label in (211, -1):
        case = make(padded=(30, 30))
        case.labels[0] = label
        with pytest.raises((RuntimeError, IndexError), match="labels: one is outside"):
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

    def spy(*arguments: Any) -> chunked.Sums:
        sums = run_chunks(*arguments)
        grads = (sums.hidden_grad, sums.weight_grad, sums.bias_grad)
        needs.append([grad is not None for grad in grads])
        return sums

    monkeypatch.setattr("ddk_ds.kernels.custom_op.run_chunks", spy)
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


@pytest.mark.parametrize("engine", ["native", "eager"])
def test_no_tensor_of_all_tokens_by_vocabulary(engine: Engine) -> None:
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.nbytes for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor))
            return out

    case = make(160, 1000, (8, 8), temperature=2.0)
    options = Options(vocab_size=1000, gamma=0.5, temperature=2.0, chunk_tokens=32, engine=engine)
    student = HeadInput(case.student_hidden.detach(), case.student_weight.detach())
    teacher = HeadInput(case.teacher_hidden, case.teacher_weight)
    with Watch():
        run_chunks(Call(student, teacher, case.labels, None, Wanted(hidden=True, weight=True)), options)
    assert max(sizes) == 32 * 1024 * 4  # one model's float32 logits of one chunk


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
        ({"chunk_tokens": -1}, "chunk_tokens is -1"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make().run(**changes)


def test_linear_nll_refuses_bad_arguments() -> None:
    case = make()
    with pytest.raises(ConfigError, match="vocab_size is 999, weight has 211 rows"):
        linear_nll(case.student_hidden, case.student_weight, case.labels, options=Options(999, gamma=0.0))
    with pytest.raises(ConfigError, match="chunk_tokens is -1"):
        options = Options(211, gamma=0.0, chunk_tokens=-1)
        linear_nll(case.student_hidden, case.student_weight, case.labels, options=options)
