"""A teacher that is known by a few tokens of each row, in every row kernel, against float64 from all logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddk_ds.kernels import Divergence, LogitForm, Options, TeacherTopK, top_k_of
from ddk_ds.kernels.options import Engine
from tests.unit.kernels.kd_case import ENGINES, Case, assert_agrees, error, make, rows_for
from tests.unit.kernels.test_topk_tail import by_definition, with_deviations

# Triton's interpreter warns of a very low logit in a softcap.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{what}") for what in ("overflow", "invalid value")]
FORMS = [LogitForm(), LogitForm(0.7), LogitForm(1.3, 20.0)]


def by_top_k(case: Case, k: int) -> Case:
    """Return the case with the teacher's top k in place of its hidden states."""
    assert case.teacher_hidden is not None and case.teacher_weight is not None
    options = Options(case.vocab_size, gamma=0.0, temperature=case.temperature, teacher_form=case.teacher_form)
    topk = top_k_of(case.teacher_hidden, case.teacher_weight, k, options=options, bias=case.teacher_bias)
    return replace(case, teacher_hidden=None, teacher_weight=None, teacher_bias=None, teacher_topk=topk)


def by_draws(case: Case, draws: int) -> tuple[Case, Tensor]:
    """Return the case with distinct drawn tokens and their shares for a teacher, and those shares (n, V) in float64."""
    assert case.teacher_hidden is not None and case.teacher_weight is not None
    logits = case.teacher_hidden.double() @ case.teacher_weight[: case.vocab_size].double().T
    drawn = (logits / case.temperature).softmax(-1).multinomial(draws, replacement=True)
    shares = torch.zeros_like(logits).scatter_add_(1, drawn, torch.full(drawn.shape, 1 / draws, dtype=torch.float64))
    width = int((shares > 0).sum(1).max())
    found = shares.topk(width, -1)
    ids = torch.where(found.values > 0, found.indices, -1)
    teacher = TeacherTopK(ids, found.values.log(), torch.full(ids.shape[:1], -torch.inf))
    return replace(case, teacher_hidden=None, teacher_weight=None, teacher_bias=None, teacher_topk=teacher), shares


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k(engine: Engine, form: LogitForm, temperature: float) -> None:
    rows = rows_for(engine, 37)
    case = make(rows, 211, student_form=form, teacher_form=form, temperature=temperature, bias=True, padded=(5, 9))
    assert_agrees(by_top_k(case, 9), 1e-6, 1e-6, engine=engine, chunk_tokens=rows // 3 + 1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(engine: Engine, dtype: torch.dtype) -> None:
    case = by_top_k(make(37, 211, dtype=dtype), 9)
    assert_agrees(case, 1e-6, 5e-3, engine="eager" if engine == "native" and dtype == torch.float16 else engine)


def test_float64_in_a_compiled_kernel() -> None:
    """Rounding of the top k to float32 is the reference's too."""
    assert_agrees(by_top_k(make(37, 2111, dtype=torch.float64, temperature=2.0), 64), 1e-9, 1e-9, engine="native")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ce_weight", [0.0, 1.0])
def test_draws(engine: Engine, ce_weight: float) -> None:
    """The loss is sum w (log w - log p), whose gradient is p - w; rows have different numbers of distinct tokens."""
    case, shares = by_draws(make(37, 211, std=4.0, ce_weight=ce_weight, temperature=1.5), 20)
    assert case.teacher_topk is not None
    counts = (case.teacher_topk.ids >= 0).sum(1)
    assert counts.min() < counts.max() <= 20
    leaves = [leaf.detach().double().requires_grad_() for leaf in case.leaves()]
    valid = case.labels >= 0
    logits = (leaves[0] @ leaves[1].T)[valid]
    ce = -logits.log_softmax(-1).gather(1, case.labels[valid][:, None]).mean()
    w = shares[valid]
    kl = (torch.where(w > 0, w.log(), 0) - (logits / 1.5).log_softmax(-1)).mul(w).sum(-1).mean()
    loss = ce_weight * ce + case.gamma * 1.5**2 * kl
    found = case.run(engine=engine, chunk_tokens=16)
    assert error(found.loss, loss) < 1e-6 and error(found.kl, kl) < 1e-6
    expected = torch.autograd.grad(loss, leaves)
    for grad, want in zip(torch.autograd.grad(found.loss, case.leaves()), expected, strict=True):
        assert error(grad, want) < 1e-6


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon", "total_variation"])
def test_places_without_a_token_take_no_part(divergence: Divergence) -> None:
    case = by_top_k(make(20, 61, dtype=torch.float64, divergence=divergence), 7)
    topk = case.teacher_topk
    assert topk is not None
    ids = torch.cat([topk.ids, torch.full_like(topk.ids[:, :3], -1)], 1)
    log_probs = torch.cat([topk.log_probs, torch.full_like(topk.log_probs[:, :3], -torch.inf)], 1)
    wider = replace(case, teacher_topk=TeacherTopK(ids, log_probs, topk.log_tail))
    assert error(wider.run().kl, case.run().kl.double()) < 1e-12
    grads = [torch.autograd.grad(c.run().loss, c.leaves())[1] for c in (wider, case)]
    assert error(*grads) < 1e-12


@pytest.mark.parametrize("engine", ["native", "triton"])
@pytest.mark.parametrize(("student", "teacher"), [(3.0, 30.0), (30.0, 3.0), (100.0, 30.0)])
def test_a_tail_below_the_rounding_of_one(engine: Engine, student: float, teacher: float) -> None:
    dense = with_deviations(student, teacher)
    case = by_top_k(dense, 20)
    assert case.teacher_topk is not None
    expected, grads = by_definition(dense, case.teacher_topk.ids, "forward_kl", 1.0)
    found = case.run(engine=engine)
    assert error(found.loss, expected) < 1e-5
    for grad, want in zip(torch.autograd.grad(found.loss, case.leaves()), grads, strict=True):
        assert error(grad, want) < 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_near_the_teacher(engine: Engine) -> None:
    """The student is the teacher, but for 1e-3 of its hidden states: naive sums would have no digit left."""
    case = make(29, 1024, (64, 64), std=3.0, gamma=1.0, ce_weight=0.0)
    moved = case.student_hidden.detach() * (1 + 1e-3 * torch.randn(29, 64, generator=torch.Generator().manual_seed(1)))
    case = by_top_k(replace(case, teacher_hidden=moved, teacher_weight=case.student_weight.detach()), 32)
    assert_agrees(case, 2e-3, 2e-3, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_token_is_known(engine: Engine) -> None:
    assert_agrees(by_top_k(make(9, 31), 31), 1e-6, 1e-6, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_shows(engine: Engine) -> None:
    case = by_top_k(make(12, 31), 5)
    assert case.teacher_topk is not None
    with torch.no_grad():
        case.student_hidden[int((case.labels >= 0).nonzero()[0]), 3] = float("nan")
    assert case.run(engine=engine).loss.isnan()


def test_a_compiled_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many times faster than the eager rows, which stay for other divergences."""
    monkeypatch.setattr("ddk_ds.kernels.chunked.eager_rows", None)
    case = by_top_k(make(12, 31), 5)
    assert case.run().loss.isfinite()
    with pytest.raises(TypeError):
        replace(case, divergence="reverse_kl").run()
