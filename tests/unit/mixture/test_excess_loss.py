"""The updates of Sheared LLaMA and DoReMi, each compared with a second implementation of its paper's algorithm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_ds.errors import ConfigError, DataError
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.decide import Controller
from tests.unit.mixture.mixture_section import section

SIZES = {"code": 100, "maths": 300, "prose": 600}
losses = st.lists(st.floats(0.01, 9.0), min_size=3, max_size=3)


def build(kind: str, **options: Any) -> Controller:
    return make_controller(section(kind, **options), SIZES)


EQUAL = np.log(np.full(3, 1 / 3))


def sheared_llama(proportions: list[float], student: list[float], reference: list[float]) -> list[float]:
    """Compute the update of arXiv 2310.06694, Algorithm 1, from losses."""
    alpha = [w * math.exp(max(a - b, 0.0)) for w, a, b in zip(proportions, student, reference, strict=True)]
    return [value / sum(alpha) for value in alpha]


def doremi(proportions: list[float], student: list[float], reference: list[float], eta: float, c: float) -> list[float]:
    """Compute the update of arXiv 2305.10429, Algorithm 1, from losses."""
    raised = [w * math.exp(eta * max(a - b, 0.0)) for w, a, b in zip(proportions, student, reference, strict=True)]
    return [(1 - c) * value / sum(raised) + c * (1 / len(raised)) for value in raised]


@settings(deadline=None)
@given(losses, losses, st.floats(0, 3), st.floats(0, 1))
def test_updates_are_the_papers(student: list[float], teacher: list[float], eta: float, c: float) -> None:
    proportions = [0.1, 0.3, 0.6]
    perplexities = np.exp(student), np.exp(teacher)
    computed = build("sheared_llama").update(np.log(proportions), *perplexities, interval=1)
    np.testing.assert_allclose(computed.proportions, sheared_llama(proportions, student, teacher), rtol=1e-12)
    computed = build("doremi_online", step_size=eta, smoothing=c).update(np.log(proportions), *perplexities, interval=1)
    np.testing.assert_allclose(computed.proportions, doremi(proportions, student, teacher, eta, c), rtol=1e-12)


def test_a_domain_at_its_reference_gains_nothing_from_being_under_it() -> None:
    references = {"code": 1.0, "maths": 2.0, "prose": 3.0}
    for kind in ("sheared_llama", "doremi_online"):
        controller = build(kind, reference_losses=references)
        at = controller.update(EQUAL, np.exp([2.0, 2.0, 3.0]), None, interval=1)
        under = controller.update(EQUAL, np.exp([2.0, 0.5, 3.0]), None, interval=1)
        np.testing.assert_array_equal(at.proportions, under.proportions)
        assert at.proportions[0] > at.proportions[1] == at.proportions[2]


def test_large_losses_do_not_overflow() -> None:
    student, teacher = [1e300, 2.0, 3.0], [1.0, 2.0, 3.0]
    np.testing.assert_allclose(
        build("sheared_llama").update(EQUAL, student, teacher, interval=1).proportions, [1, 0, 0], atol=1e-12
    )
    computed = build("doremi_online", step_size=5.0).update(EQUAL, student, teacher, interval=1)
    np.testing.assert_allclose(computed.proportions, [1 - 2e-3 / 3, 1e-3 / 3, 1e-3 / 3])


@pytest.mark.parametrize("kind", ["sheared_llama", "doremi_online"])
def test_they_begin_with_the_prior(kind: str) -> None:
    def start(**options: Any) -> list[float]:
        return build(kind, **options).start([9.0, 9.0, 9.0], [3.0, 1.0, 1.0]).proportions.tolist()

    assert start() == [1 / 3] * 3
    assert start(prior="by_size") == [0.1, 0.3, 0.6]
    assert start(prior={"prose": 0.5, "code": 0.25, "maths": 0.25}) == [0.25, 0.25, 0.5]


@pytest.mark.parametrize("kind", ["sheared_llama", "doremi_online"])
def test_given_references_take_the_teachers_place(kind: str) -> None:
    by_teacher = build(kind)
    reference = {"prose": math.log(2.0), "code": math.log(3.0), "maths": math.log(12.0)}
    by_reference = build(kind, reference_losses=reference)
    assert by_teacher.uses_teacher and not by_reference.uses_teacher
    logs, student = np.log([0.2, 0.3, 0.5]), [9.0, 30.0, 12.0]
    np.testing.assert_allclose(
        by_reference.update(logs, student, None, interval=1).proportions,
        by_teacher.update(logs, student, [3.0, 12.0, 2.0], interval=1).proportions,
        rtol=1e-14,
    )
    with pytest.raises(DataError, match="teacher's perplexities are missing"):
        by_teacher.update(logs, student, None, interval=1)
    with pytest.raises(DataError, match="student's perplexity of domain 'maths' is nan"):
        by_reference.update(logs, [9.0, float("nan"), 12.0], None, interval=1)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"code": 1.0, "maths": 1.0}, "reference_losses: 'prose' has no loss"),
        ({"code": 1.0, "maths": 1.0, "prosa": 1.0}, "'prosa' is not a domain of this run: did you mean 'prose'"),
        ({"code": 1.0, "maths": -1.0, "prose": 1.0}, "mixture.reference_losses.maths: .* got -1.0"),
    ],
)
def test_bad_references_are_refused(reference: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("sheared_llama", reference_losses=reference)
