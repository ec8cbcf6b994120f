"""Tokens drawn from a teacher: a pure function of seed and sample, and right on average.

Right values are the whole teacher's softmax, KL and gradient in float64.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddk_ds.errors import ConfigError
from ddk_ds.kernels import (
    LabelLogProbs,
    LogitForm,
    Options,
    TeacherDraws,
    TeacherTopK,
    counted_draws,
    draws_of,
    top_k_of,
)
from ddk_ds.kernels.teacher_draws import _mixed
from tests.unit.kernels.kd_case import Case, error, make, truth
from tools.bench.draws_gradient import counted

SAMPLES = torch.tensor([7, 123_456_789_012, 3])
LENGTH = 5
SEEDS = 300


def case_of(**options: object) -> Case:
    return make(15, 83, std=3.0, ignored=0.0, ce_weight=0.0, gamma=1.0, **options)  # type: ignore[arg-type]


def drawn(case: Case, draws: int, seed: int, samples: Tensor = SAMPLES, **changes: object) -> TeacherDraws:
    assert case.teacher_hidden is not None and case.teacher_weight is not None
    options = Options(
        case.vocab_size, gamma=0.0, temperature=case.temperature, teacher_form=case.teacher_form, **changes
    )  # type: ignore[arg-type]
    hidden = case.teacher_hidden[: len(samples) * LENGTH]
    return draws_of(hidden, case.teacher_weight, samples, draws, seed=seed, options=options, bias=case.teacher_bias)


def probabilities(case: Case) -> Tensor:
    """Return the teacher's softmax at the case's temperature, in float64."""
    assert case.teacher_hidden is not None and case.teacher_weight is not None
    logits = case.teacher_hidden.double() @ case.teacher_weight[: case.vocab_size].double().T
    if case.teacher_bias is not None:
        logits = logits + case.teacher_bias[: case.vocab_size].double()
    form = case.teacher_form
    logits = logits * form.scale if not form.softcap else form.softcap * (logits * form.scale / form.softcap).tanh()
    return (logits / case.temperature).softmax(-1)


def shares(draws: TeacherDraws, vocab_size: int) -> Tensor:
    counted = torch.zeros(len(draws.ids), vocab_size, dtype=torch.float64)
    return counted.scatter_add_(1, draws.ids, torch.full(draws.ids.shape, 1 / draws.ids.shape[1]).double())


def test_the_numbers_are_those_of_splitmix64() -> None:
    """The first outputs of the published generator from state 0."""
    state = torch.tensor([0, -7046029254386353131])
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert [int(x) % 2**64 for x in _mixed(state)] == expected


def mixed(number: int) -> int:
    """Return SplitMix64's next output from a state, by Python's integers."""
    z = (number + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def test_the_same_tokens_are_drawn_for_ever() -> None:
    """A cache on a disk is right only with them: by Python's integers, and by the cumulated softmax in float64."""
    case, draws, seed = make(15, 1003, std=2.0), 40, 3
    q = probabilities(case)
    expected = torch.empty(15, draws, dtype=torch.int64)
    for sample, number in enumerate(SAMPLES.tolist()):
        for position in range(LENGTH):
            key = mixed(mixed(number + mixed(seed)) + position)
            places = [(j + (mixed(key + j) >> 11) / 2**53) / draws for j in range(draws)]
            row = sample * LENGTH + position
            expected[row] = torch.searchsorted(q[row].cumsum(0), torch.tensor(places, dtype=torch.float64), right=True)
    found = drawn(case, draws, seed)
    assert torch.equal(found.ids, expected)
    assert error(found.entropy.double(), -(q * q.log()).sum(-1)) < 1e-6


@pytest.mark.parametrize(
    "case",
    [
        case_of(),
        case_of(temperature=2.0, bias=True, padded=(3, 9)),
        case_of(teacher_form=LogitForm(0.8, 5.0), dtype=torch.bfloat16),
    ],
)
def test_shares_are_right_on_average(case: Case) -> None:
    """Over 1,000 seeds: each share's mean is the probability, by a chi-square over all tokens of a row."""
    q = probabilities(case)
    found = torch.stack([shares(drawn(case, 16, seed), case.vocab_size) for seed in range(1_000)])
    assert (found.sum(-1) - 1).abs().max() < 1e-12
    assert ((found - q) * 16).abs().max() < 2  # stratified: two ends of a token's part can be in or out
    variance = stratified_variance(q, 16) / 1_000
    tried = variance * 1_000**2 * 16**2 > 10  # drawn often enough for a mean to be nearly normal
    assert tried.sum() > 100
    error = (found.mean(0) - q)[tried] / variance[tried].sqrt()
    assert error.abs().max() < 5.0
    assert abs(float((error**2).mean()) - 1) < 0.25, "means are as far from the truth as their spread says"


def stratified_variance(q: Tensor, draws: int) -> Tensor:
    """Return the variance (n, V) of each token's share: each n-th part draws it with the chance of their overlap."""
    ends = q.cumsum(-1)[..., None] * draws
    starts, part = ends - q[..., None] * draws, torch.arange(draws)
    chance = (torch.minimum(ends, part + 1.0) - torch.maximum(starts, part.double())).clamp(0, 1)
    return (chance * (1 - chance)).sum(-1) / draws**2


def test_loss_and_gradient_are_the_whole_teachers_on_average() -> None:
    case = case_of(temperature=1.5)
    dense, dense_grads = truth(case)
    values, grads = [], []
    for seed in range(SEEDS):
        draws = drawn(case, 16, seed)
        topk, offset = known_of(draws)
        known = replace(case, teacher_hidden=None, teacher_weight=None, teacher_topk=topk)
        found = known.run()
        values.append(found.kl.detach().double() + offset.double().mean())
        grads.append(torch.autograd.grad(found.loss, known.leaves())[1].double())
    kl = torch.stack(values)
    assert abs(kl.mean() - dense.kl) < 4 * kl.std() / SEEDS**0.5
    stacked = torch.stack(grads)
    error = (stacked.mean(0) - dense_grads[1]) / (stacked.std(0) / SEEDS**0.5)
    assert abs(float((error**2).mean()) - 1) < 0.25
    assert error.abs().max() < 5.5


def test_stratified_draws_vary_less_than_independent_ones() -> None:
    case = case_of()
    q = probabilities(case)
    found = torch.stack([shares(drawn(case, 16, seed), case.vocab_size) for seed in range(300)])
    assert found.var(0).sum() < 0.5 * (q * (1 - q) / 16).sum()


def test_draws_belong_to_the_sample() -> None:
    """Neither the chunk, nor the place in the batch, nor the batch's other samples matter."""
    case = case_of()
    whole = drawn(case, 64, 1)
    assert torch.equal(drawn(case, 64, 1, chunk_tokens=4).ids, whole.ids)
    assert case.teacher_hidden is not None
    order = torch.tensor([2, 0, 1])
    moved = replace(case, teacher_hidden=case.teacher_hidden.view(3, LENGTH, -1)[order].flatten(0, 1))
    assert torch.equal(
        drawn(moved, 64, 1, SAMPLES[order]).ids.view(3, LENGTH, -1), whole.ids.view(3, LENGTH, -1)[order]
    )
    assert torch.equal(drawn(case, 64, 1, SAMPLES[:1]).ids, whole.ids[:LENGTH])
    assert not torch.equal(drawn(case, 64, 2).ids, whole.ids)
    same_states = replace(case, teacher_hidden=case.teacher_hidden[:1].expand(15, -1).contiguous())
    assert len({tuple(row) for row in drawn(same_states, 64, 1).ids.tolist()}) == 15, "positions differ"


@pytest.mark.parametrize("top_k", [False, True])
def test_the_labels_have_their_probability_at_temperature_1(top_k: bool) -> None:
    case = case_of(temperature=2.0, bias=True, padded=(3, 9), teacher_form=LogitForm(0.8, 5.0))
    labels = torch.arange(15) * 5  # 70 at most
    labels[[4, 9]] = torch.tensor([-100, -1])
    of_labels = LabelLogProbs(labels, torch.full((15,), 7.0))
    assert case.teacher_hidden is not None and case.teacher_weight is not None
    options = Options(case.vocab_size, gamma=0.0, temperature=2.0, teacher_form=case.teacher_form, chunk_tokens=4)
    rest: dict[str, Any] = {"options": options, "bias": case.teacher_bias, "of_labels": of_labels}
    if top_k:
        top_k_of(case.teacher_hidden, case.teacher_weight, 3, **rest)
    else:
        draws_of(case.teacher_hidden, case.teacher_weight, SAMPLES, 3, seed=0, **rest)
    expected = probabilities(replace(case, temperature=1.0)).log().gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    expected[[4, 9]] = 0.0
    torch.testing.assert_close(of_labels.log_probs.double(), expected, rtol=1e-5, atol=1e-6)
    assert of_labels.log_probs[[4, 9]].tolist() == [0.0, 0.0]


def test_known_tokens_are_distinct_with_their_counts() -> None:
    known, offset = known_of(TeacherDraws(torch.tensor([[2, 2, 5, 9], [7, 7, 7, 7]]), torch.tensor([0.5, 0.25])))
    assert known.ids.tolist() == [[2, -1, 5, 9], [7, -1, -1, -1]]
    assert known.log_probs.exp().tolist() == [[0.5, 0.0, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]
    assert offset.tolist() == pytest.approx([-0.5 + 1.5 * math.log(2), -0.25])
    assert known.log_tail.tolist() == [-torch.inf] * 2


def test_a_sure_teacher_and_ends_of_the_distribution() -> None:
    case = case_of()
    assert case.teacher_hidden is not None and case.teacher_weight is not None
    with torch.no_grad():
        case.teacher_weight[:, 0] = 0
        case.teacher_weight[82, 0] = 500.0  # the last token has all
        case.teacher_hidden[:, 0] = 1.0
    draws = drawn(case, 64, 0)
    assert draws.ids.unique().tolist() == [82]
    assert draws.entropy.abs().max() < 1e-6
    assert known_of(draws)[1].abs().max() < 1e-6


def test_65_535_draws_are_the_teacher() -> None:
    """Each share is off by less than two draws, and so little are loss and gradient off those of the whole teacher."""
    case = case_of(temperature=1.5)
    draws = drawn(case, 65_535, 0)
    assert ((shares(draws, case.vocab_size) - probabilities(case)) * 65_535).abs().max() < 2
    topk, offset = known_of(draws)
    known = replace(case, teacher_hidden=None, teacher_weight=None, teacher_topk=topk)
    dense, dense_grads = truth(case)
    for engine in ("auto", "eager"):
        found = known.run(engine=engine)
        assert float(found.kl.double() + offset.double().mean()) == pytest.approx(float(dense.kl), abs=1e-4)
        assert error(torch.autograd.grad(found.loss, known.leaves())[1].double(), dense_grads[1]) < 1e-3


def known_of(draws: TeacherDraws) -> tuple[TeacherTopK, Tensor]:
    return counted_draws(*counted(draws.ids), draws.entropy, draws.ids.shape[1])


@pytest.mark.parametrize("count", [0, 65_536])
def test_a_number_of_draws_that_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"draws is {count}: give 1 to 65,535"):
        drawn(case_of(), count, 0)


def test_samples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sample_ids are torch.int64 \(4,\) for 15 rows"):
        drawn(case_of(), 4, 0, torch.arange(4))
