"""Eq. 1 and Eq. 2 against 60-digit decimals, their bounds, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_ds.errors import ConfigError, DataError
from ddk_ds.mixture.factors import (
    check_perplexities,
    check_proportions,
    discrepancy,
    initial_factors,
    is_nearly_one_hot,
    one_hot_warning,
    smooth_update,
)

NAMES = ["code", "maths", "prose"]


@st.composite
def domains(draw: st.DrawFn) -> tuple[list[float], list[float], list[float]]:
    """Student and teacher perplexities with ratios up to 1e4, and proportions of which some may be 0."""
    num_domains = draw(st.integers(1, 12))
    teacher = draw(st.lists(st.floats(1.0, 50.0), min_size=num_domains, max_size=num_domains))
    ratios = draw(st.lists(st.floats(0.01, 1e4), min_size=num_domains, max_size=num_domains))
    weights = draw(st.lists(st.integers(0, 100), min_size=num_domains, max_size=num_domains))
    weights[0] += not any(weights)
    factors = np.array(weights) / sum(weights)
    return [t * r for t, r in zip(teacher, ratios, strict=True)], teacher, factors.tolist()


def exact(
    student: Sequence[float], teacher: Sequence[float], factors: Sequence[float] | None, alpha: float
) -> list[Decimal]:
    """Eq. 2 in decimals, and Eq. 1 with factors None and alpha 1."""
    with localcontext() as context:
        context.prec = 60
        psi = [(Decimal(s) / Decimal(t)).exp() for s, t in zip(student, teacher, strict=True)]
        if factors is not None:
            psi = [Decimal(r) * p for r, p in zip(factors, psi, strict=True)]
        rest = (1 - Decimal(alpha)) / len(psi)
        return [Decimal(alpha) * p / sum(psi) + rest for p in psi]


def assert_equal(found: np.ndarray, expected: list[Decimal]) -> None:
    assert found.dtype == np.float64
    assert max(abs(Decimal(float(a)) - b) for a, b in zip(found, expected, strict=True)) < Decimal("1e-12")


@settings(deadline=None)
@given(domains())
def test_eq1_is_the_exact_softmax_of_the_ratios(case: tuple[list[float], list[float], list[float]]) -> None:
    student, teacher, _ = case
    found = initial_factors(student, teacher)
    assert_equal(found, exact(student, teacher, None, 1.0))
    assert abs(found.sum() - 1) < 1e-12


@settings(deadline=None)
@given(domains(), st.floats(0, 1))
def test_eq2_is_exact_and_keeps_its_floor(case: tuple[list[float], list[float], list[float]], alpha: float) -> None:
    student, teacher, factors = case
    found = smooth_update(factors, student, teacher, alpha=alpha)
    assert_equal(found, exact(student, teacher, factors, alpha))
    assert abs(found.sum() - 1) < 1e-12
    assert (found >= (1 - alpha) / len(factors)).all()


def test_a_worked_example() -> None:
    # Ratios 1 and 2: r_0 = softmax(1, 2); psi = r_0 exp(1, 2) is proportional to exp(2, 4).
    r0 = initial_factors([10.0, 8.0], [10.0, 4.0])
    np.testing.assert_allclose(r0, [1 / (1 + np.e), np.e / (1 + np.e)], rtol=1e-14)
    r1 = smooth_update(r0, [10.0, 8.0], [10.0, 4.0], alpha=0.5)
    np.testing.assert_allclose(r1, [0.25 + 0.5 / (1 + np.e**2), 0.25 + 0.5 * np.e**2 / (1 + np.e**2)], rtol=1e-14)


def test_no_domain_with_a_proportion_loses_it_to_one_without() -> None:
    # The largest ratio belongs to a domain with r_t = 0: its psi is 0, however large exp(ratio) is.
    found = smooth_update([0.0, 1e-300, 1.0 - 1e-300], [1e4, 900.0, 1.0], [1.0, 1.0, 1.0], alpha=1.0)
    np.testing.assert_allclose(found, [0.0, 1.0, 0.0], atol=1e-12)


def test_the_ratio_cap_bounds_the_ratio_before_exp() -> None:
    found = initial_factors([40.0, 5.0, 2.0], [1.0, 1.0, 1.0], ratio_cap=6.0)
    np.testing.assert_allclose(found, initial_factors([6.0, 5.0, 2.0], [1.0, 1.0, 1.0]), rtol=1e-15)
    factors = [0.2, 0.3, 0.5]
    np.testing.assert_allclose(
        smooth_update(factors, [40.0, 5.0, 2.0], [1.0] * 3, alpha=0.5, ratio_cap=6.0),
        smooth_update(factors, [6.0, 5.0, 2.0], [1.0] * 3, alpha=0.5),
        rtol=1e-15,
    )


@settings(deadline=None)
@given(domains(), st.floats(0, 1))
def test_the_floor_of_r0(case: tuple[list[float], list[float], list[float]], share: float) -> None:
    student, teacher, _ = case
    floor = share / len(student)
    found = initial_factors(student, teacher, floor=floor)
    assert (found >= floor).all()
    assert abs(found.sum() - 1) < 1e-12
    np.testing.assert_allclose(found - floor, (1 - share) * initial_factors(student, teacher), atol=1e-12)


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
        lambda: initial_factors(student, teacher, names=NAMES),
        lambda: smooth_update([0.2, 0.3, 0.5], student, teacher, alpha=0.5, names=NAMES),
        lambda: discrepancy(student, teacher, names=NAMES),
    ):
        with pytest.raises(DataError, match=f"{model}'s perplexity of domain 'maths'"):
            call()


def test_missing_and_surplus_perplexities_are_refused() -> None:
    with pytest.raises(DataError, match="teacher's perplexities are missing"):
        initial_factors([2.0], None)
    with pytest.raises(DataError, match="domain 'prose' is missing"):
        check_perplexities([2.0, 3.0], model="student", names=NAMES)
    with pytest.raises(DataError, match="4 perplexities for 3 domains"):
        check_perplexities([2.0, 3.0, 4.0, 5.0], model="student", names=NAMES)
    with pytest.raises(DataError, match="2 perplexities of the student, 3 of the teacher"):
        initial_factors([2.0, 3.0], [2.0, 3.0, 4.0])
    with pytest.raises(DataError, match="empty"):
        check_perplexities([], model="student")
    with pytest.raises(DataError, match="domain 1 overflows"):
        initial_factors([1.0, 1e300], [1.0, 1e-300])


def test_options_out_of_range_are_refused() -> None:
    ones = [1.0, 1.0]
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"mixture\.alpha"):
            smooth_update([0.5, 0.5], ones, ones, alpha=alpha)
    for cap in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"mixture\.ratio_cap"):
            initial_factors(ones, ones, ratio_cap=cap)
    for floor in (-0.1, 0.51, float("nan")):
        with pytest.raises(ConfigError, match=r"mixture\.initial_floor"):
            initial_factors(ones, ones, floor=floor)


@pytest.mark.parametrize("values", [[0.5, 0.6], [1.5, -0.5], [float("nan"), 1.0], [1.0], [0.2, 0.3, 0.5]])
def test_bad_proportions_are_refused(values: list[float]) -> None:
    with pytest.raises(ConfigError, match="the factors r_t"):
        smooth_update(values, [1.0, 1.0], [1.0, 1.0], alpha=0.5)
    with pytest.raises(ConfigError, match=r"mixture\.proportions"):
        check_proportions(values, num_domains=2, what="mixture.proportions")


def test_a_weak_students_r0_is_warned_of() -> None:
    r0 = initial_factors([40.0, 5.0, 5.0], [1.0, 1.0, 1.0])
    assert is_nearly_one_hot(r0)
    warning = one_hot_warning(r0, NAMES)
    assert warning is not None
    for part in ("100.0%", "'code'", "mixture.ratio_cap", "mixture.initial_floor"):
        assert part in warning
    for mended in (
        initial_factors([40.0, 5.0, 5.0], [1.0, 1.0, 1.0], ratio_cap=6.0),
        initial_factors([40.0, 5.0, 5.0], [1.0, 1.0, 1.0], floor=0.1),
    ):
        assert not is_nearly_one_hot(mended)
        assert one_hot_warning(mended, NAMES) is None
    assert not is_nearly_one_hot([1.0])  # one domain alone has nothing to share with
    assert is_nearly_one_hot([0.6, 0.4], threshold=0.5)
