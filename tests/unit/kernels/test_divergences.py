"""Every divergence in every row kernel against its definition in float64, far from the teacher and next to it."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_ds.config import sections
from ddk_ds.kernels import DIVERGENCES, Divergence, LogitForm, Options, TeacherTopK, top_k_of
from ddk_ds.kernels.options import Engine
from tests.unit.kernels.kd_case import ENGINES, Case, assert_agrees, error, make, near, rows_for, truth

INTERPRETED = pytest.param("triton", marks=pytest.mark.long("interpreted, 20 s of CPU; near the teacher it stays"))
FORMS = [LogitForm(), LogitForm(0.6), LogitForm(1.3, 20.0)]


def naive_grad_error(case: Case, expected: list[torch.Tensor]) -> float:
    """Return the largest error of the gradients by full float32 logits and autograd."""
    loss = case.run(naive_loss)
    grads = torch.autograd.grad(loss, case.leaves())
    return max(error(grad, want) for grad, want in zip(grads, expected, strict=True))


def naive_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, *, num_valid, options, **_):  # type: ignore[no-untyped-def]
    """Compute the loss the plain way: the inputs' dtype, softmaxes in float32, forward KL."""
    valid = labels != -100
    student = (student_hidden @ student_weight.T)[valid].float()
    teacher = (teacher_hidden @ teacher_weight.T)[valid].float()
    t = options.temperature
    log_p, log_q = torch.log_softmax(student / t, -1), torch.log_softmax(teacher / t, -1)
    kl = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="sum")
    ce = torch.nn.functional.cross_entropy(student, labels[valid], reduction="sum")
    return (ce + options.gamma * t**2 * kl) / num_valid


def test_the_configuration_knows_the_same_divergences() -> None:
    assert get_args(sections.Divergence) == DIVERGENCES


@pytest.mark.parametrize("engine", ["native", "eager", INTERPRETED])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_is_exact(engine: Engine, form: LogitForm, temperature: float, divergence: Divergence) -> None:
    rows = rows_for(engine, 29)
    case = make(rows, 507, (64, 96), std=3.0, temperature=temperature, bias=True, padded=(5, 0))
    case = replace(case, divergence=divergence, student_form=form, teacher_form=form)
    assert_agrees(case, 5e-7, 1e-6, engine=engine, chunk_tokens=rows // 2 + 1)


@pytest.mark.parametrize("engine", ["native", INTERPRETED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_precision(engine: Engine, dtype: torch.dtype, divergence: Divergence) -> None:
    case = make(rows_for(engine, 29), 507, (64, 96), std=3.0, dtype=dtype, divergence=divergence)
    assert_agrees(case, 5e-7, 5e-3, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("step", [0.05, 0.006, 0.002])
@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "total_variation"])
def test_near_the_teacher(engine: Engine, step: float, divergence: Divergence) -> None:
    case = replace(near(rows_for(engine, 32), step, torch.float32), divergence=divergence, ce_weight=0.0, gamma=1.0)
    expected, expected_grads = truth(case)
    found = case.run(engine=engine)
    assert error(found.kl, expected.kl) <= 1e-4
    for grad, want in zip(torch.autograd.grad(found.loss, case.leaves()), expected_grads, strict=True):
        assert error(grad, want) <= 1e-3


@pytest.mark.parametrize("engine", ["native", "eager", INTERPRETED])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("std", [1e3, 1e4])
def test_large_logits_stay_finite(engine: Engine, divergence: Divergence, std: float) -> None:
    case = make(rows_for(engine, 67), std=std, divergence=divergence)
    found = case.run(engine=engine)
    grads = torch.autograd.grad(found.loss, case.leaves())
    assert all(bool(value.isfinite().all()) for value in (found.loss, found.ce, found.kl, *grads))
    expected, _ = truth(case)
    assert error(found.loss, expected.loss) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_no_worse_than_naive_where_float32_ends(engine: Engine) -> None:
    case = make(128, 1000, (64, 64), std=3e3)
    _, expected = truth(case)
    grads = torch.autograd.grad(case.run(engine=engine).loss, case.leaves())
    ours = max(error(grad, want) for grad, want in zip(grads, expected, strict=True))
    assert ours <= 1.1 * naive_grad_error(case, expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_constant_rows(engine: Engine, divergence: Divergence) -> None:
    """With equal logits in both models the distributions are uniform: divergence and gradient are 0."""
    case = make(9, 123, divergence=divergence, ce_weight=0.0)
    with torch.no_grad():
        case.student_hidden.zero_()
        case.teacher_hidden.zero_()
    found = case.run(engine=engine)
    assert abs(float(found.kl)) < 1e-7
    assert all(float(grad.detach().abs().max()) < 1e-7 for grad in torch.autograd.grad(found.loss, case.leaves()))


@pytest.mark.parametrize("engine", ["native", "eager", INTERPRETED])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_shows(engine: Engine, divergence: Divergence) -> None:
    for name in ("student_hidden", "teacher_hidden"):
        case = make(rows_for(engine, 67), divergence=divergence)
        with torch.no_grad():
            getattr(case, name)[int((case.labels != -100).nonzero()[0]), 3] = float("nan")
        assert case.run(engine=engine).loss.isnan()


@settings(max_examples=20, deadline=None)
@given(
    num_tokens=st.sampled_from([1, 7, 252, 507]),
    vocab_size=st.sampled_from([2, 123, 1000, 2049]),
    hidden=st.sampled_from([(64, 64), (72, 24), (576, 64)]),
    std=st.floats(0.01, 3.0),
    temperature=st.floats(0.1, 4.0),
    gamma=st.floats(0.01, 10.0),
    coefficient=st.floats(0.05, 0.95),
    divergence=st.sampled_from(DIVERGENCES),
    engine=st.sampled_from(["native", "eager"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_value(
    num_tokens: int,
    vocab_size: int,
    hidden: tuple[int, int],
    std: float,
    temperature: float,
    gamma: float,
    coefficient: float,
    divergence: Divergence,
    engine: Engine,
    seed: int,
) -> None:
    case = make(num_tokens, vocab_size, hidden, std=std, dtype=torch.float64, seed=seed, ignored=0.1, padded=(3, 9))
    if int(case.num_valid) == 0:
        return
    case = replace(case, temperature=temperature, gamma=gamma, coefficient=coefficient, divergence=divergence)
    assert_agrees(case, 1e-9, 1e-9, engine=engine, chunk_tokens=100)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_teachers_top_k(divergence: Divergence, temperature: float) -> None:
    case = make(40, 211, dtype=torch.float64, divergence=divergence, temperature=temperature, bias=True)
    options = Options(211, gamma=0.0, temperature=temperature)
    topk = top_k_of(case.teacher_hidden, case.teacher_weight, 8, options=options, bias=case.teacher_bias)
    known = replace(case, teacher_hidden=None, teacher_weight=None, teacher_bias=None, teacher_topk=topk)
    assert_agrees(known, 1e-9, 1e-9)


def test_a_top_k_of_all_tokens_is_the_teacher() -> None:
    case = make(40, 31, dtype=torch.float64)
    options = Options(31, gamma=0.0, chunk_tokens=7)
    topk = top_k_of(case.teacher_hidden, case.teacher_weight, 31, options=options)
    known = replace(case, teacher_hidden=None, teacher_weight=None, teacher_topk=TeacherTopK(*topk))
    assert error(known.run().kl, case.run().kl) < 1e-5  # log-probabilities are kept in float32
    grads = [torch.autograd.grad(c.run().loss, c.leaves())[1] for c in (known, case)]
    assert error(*grads) < 1e-5
