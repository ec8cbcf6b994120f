"""Eq. 1 and Eq. 2 against 60-digit decimals, their bounds, and the values that they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_ds.errors import ConfigError, DataError
from ddk_ds.mixture.ddk import (
    discrepancy,
    initial_factors,
    perplexity_ratios,
    updated_factors,
)
from ddk_ds.mixture.domain_vectors import Factors, Values, check_perplexities, check_proportions

NAMES = ["code", "maths", "prose"]


def eq1(student: Values, teacher: Values, cap: float | None = None, floor: float = 0.0) -> np.ndarray:
    return initial_factors(perplexity_ratios(student, teacher, cap=cap), floor=floor).proportions


def eq2(
    proportions: Sequence[float] | np.ndarray,
    student: Values,
    teacher: Values,
    alpha: float,
    cap: float | None = None,
) -> np.ndarray:
    ratios = perplexity_ratios(student, teacher, cap=cap)
    logs = Factors.of(np.asarray(proportions, np.float64)).logs
    return updated_factors(logs, ratios, alpha=alpha, prior=None).proportions


@st.composite
def domains(draw: st.DrawFn) -> tuple[list[float], list[float], list[float]]:
    """Draw student and teacher perplexities with ratios up to 1e4, and proportions that can be 0."""
    num_domains = draw(st.integers(1, 12))
    teacher = draw(st.lists(st.floats(1.0, 50.0), min_size=num_domains, max_size=num_domains))
    ratios = draw(st.lists(st.floats(0.01, 1e4), min_size=num_domains, max_size=num_domains))
    weights = draw(st.lists(st.integers(0, 100), min_size=num_domains, max_size=num_domains))
    weights[0] += not any(weights)
    proportions = np.array(weights) / sum(weights)
    return [t * r for t, r in zip(teacher, ratios, strict=True)], teacher, proportions.tolist()


def exact(
    student: Sequence[float], teacher: Sequence[float], proportions: Sequence[float] | None, alpha: float
) -> list[Decimal]:
    """Compute Eq. 2 in decimals, or Eq. 1 with proportions None and alpha 1."""
    with localcontext() as context:
        context.prec = 60
        psi = [(Decimal(s) / Decimal(t)).exp() for s, t in zip(student, teacher, strict=True)]
        if proportions is not None:
            psi = [Decimal(r) * p for r, p in zip(proportions, psi, strict=True)]
        rest = (1 - Decimal(alpha)) / len(psi)
        return [Decimal(alpha) * p / sum(psi) + rest for p in psi]


def assert_equal(computed: np.ndarray, expected: list[Decimal]) -> None:
    assert computed.dtype == np.float64
    assert max(abs(Decimal(float(a)) - b) for a, b in zip(computed, expected, strict=True)) < Decimal("1e-12")


@settings(deadline=None)
@given(domains())
def test_eq1_is_the_exact_softmax_of_the_ratios(case: tuple[list[float], list[float], list[float]]) -> None:
    student, teacher, _ = case
    computed = eq1(student, teacher)
    assert_equal(computed, exact(student, teacher, None, 1.0))
    assert abs(computed.sum() - 1) < 1e-12


@settings(deadline=None)
@given(domains(), st.floats(0, 1))
def test_eq2_is_exact_and_keeps_its_floor(case: tuple[list[float], list[float], list[float]], alpha: float) -> None:
    student, teacher, proportions = case
    computed = eq2(proportions, student, teacher, alpha=alpha)
    assert_equal(computed, exact(student, teacher, proportions, alpha))
    assert abs(computed.sum() - 1) < 1e-12
    assert (computed >= (1 - alpha) / len(proportions)).all()


def test_a_worked_example() -> None:
    # Ratios 1 and 2: r_0 = softmax(1, 2); psi = r_0 exp(1, 2) is proportional to exp(2, 4).
    r0 = eq1([10.0, 8.0], [10.0, 4.0])
    np.testing.assert_allclose(r0, [1 / (1 + np.e), np.e / (1 + np.e)], rtol=1e-14)
    r1 = eq2(r0, [10.0, 8.0], [10.0, 4.0], alpha=0.5)
    np.testing.assert_allclose(r1, [0.25 + 0.5 / (1 + np.e**2), 0.25 + 0.5 * np.e**2 / (1 + np.e**2)], rtol=1e-14)


def test_no_domain_with_a_proportion_loses_it_to_one_without() -> None:
    # The largest ratio belongs to a domain with r_t = 0: its psi is 0, however large exp(ratio) is.
    computed = eq2([0.0, 1e-300, 1.0 - 1e-300], [1e4, 900.0, 1.0], [1.0, 1.0, 1.0], alpha=1.0)
    np.testing.assert_allclose(computed, [0.0, 1.0, 0.0], atol=1e-12)


def test_the_ratio_cap_bounds_the_ratio_before_exp() -> None:
    computed = eq1([40.0, 5.0, 2.0], [1.0, 1.0, 1.0], cap=6.0)
    np.testing.assert_allclose(computed, eq1([6.0, 5.0, 2.0], [1.0, 1.0, 1.0]), rtol=1e-15)
    proportions = [0.2, 0.3, 0.5]
    np.testing.assert_allclose(
        eq2(proportions, [40.0, 5.0, 2.0], [1.0] * 3, alpha=0.5, cap=6.0),
        eq2(proportions, [6.0, 5.0, 2.0], [1.0] * 3, alpha=0.5),
        rtol=1e-15,
    )


@settings(deadline=None)
@given(domains(), st.floats(0, 1))
def test_the_floor_of_r0(case: tuple[list[float], list[float], list[float]], share: float) -> None:
    student, teacher, _ = case
    floor = share / len(student)
    computed = eq1(student, teacher, floor=floor)
    assert (computed >= floor).all()
    assert abs(computed.sum() - 1) < 1e-12
    np.testing.assert_allclose(computed - floor, (1 - share) * eq1(student, teacher), atol=1e-12)


def test_discrepancy_is_the_largest_ratio_less_one() -> None:
    assert discrepancy([3.0, 5.0, 2.0], [2.0, 4.0, 2.0]) == 0.5
    assert discrepancy([1.0], [2.0]) == -0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0, -1.0, None])
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_a_bad_perplexity_is_refused_by_name(value: float | None, model: str) -> None:
    good: list[float | None] = [2.0, 3.0, 4.0]
    bad: list[float | None] = [2.0, value, 4.0]
    student, teacher = (bad, good) if model == "student" else (good, bad)
    for call in (
        lambda: perplexity_ratios(student, teacher, cap=None, names=NAMES),
        lambda: discrepancy(student, teacher, names=NAMES),
    ):
        with pytest.raises(DataError, match=f"{model}'s perplexity of domain 'maths'"):
            call()


def test_missing_and_surplus_perplexities_are_refused() -> None:
    with pytest.raises(DataError, match="teacher's perplexities are missing"):
        eq1([2.0], None)
    with pytest.raises(DataError, match="domain 'prose' is missing"):
        check_perplexities([2.0, 3.0], model="student", names=NAMES)
    with pytest.raises(DataError, match="4 perplexities for 3 domains"):
        check_perplexities([2.0, 3.0, 4.0, 5.0], model="student", names=NAMES)
    with pytest.raises(DataError, match="2 perplexities of the student, 3 of the teacher"):
        eq1([2.0, 3.0], [2.0, 3.0, 4.0])
    with pytest.raises(DataError, match="empty"):
        check_perplexities([], model="student")
    with pytest.raises(DataError, match="domain 1 overflows"):
        eq1([1.0, 1e300], [1.0, 1e-300])


def test_a_floor_out_of_range_is_refused() -> None:
    for floor in (-0.1, 0.51, float("nan")):
        with pytest.raises(ConfigError, match=r"mixture\.initial_floor"):
            eq1([1.0, 1.0], [1.0, 1.0], floor=floor)


@pytest.mark.parametrize("values", [[0.5, 0.6], [1.5, -0.5], [float("nan"), 1.0], [1.0], [0.2, 0.3, 0.5]])
def test_bad_proportions_are_refused(values: list[float]) -> None:
    with pytest.raises(ConfigError, match="the interval's proportions r_t"):
        eq2(values, [1.0, 1.0], [1.0, 1.0], alpha=0.5)
    with pytest.raises(ConfigError, match=r"mixture\.proportions"):
        check_proportions(values, num_domains=2, label="mixture.proportions")
