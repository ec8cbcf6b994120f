"""Eq. 1 and Eq. 2 of arXiv 2407.16154 against 60 decimal digits; the bounds and the refusals."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_ds.errors import ConfigError, DataError
from ddk_ds.mixture import (
    check_perplexities,
    discrepancy,
    initial_factors,
    is_nearly_one_hot,
    one_hot_warning,
    smooth_update,
)

NAMES = ("web", "code", "math")
STUDENT, TEACHER = (30.0, 6.0, 9.0), (12.0, 4.0, 5.0)
TOLERANCE = 1e-12


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], list[float], list[float]]:
    """Student and teacher perplexities with ratios from 1e-4 to 1e4, and factors that sum to 1."""
    size = draw(st.integers(1, 12))
    column = st.lists(st.floats(1.0, 1e4), min_size=size, max_size=size)
    weights = draw(st.lists(st.integers(0, 1000), min_size=size, max_size=size).filter(any))
    return draw(column), draw(column), [weight / sum(weights) for weight in weights]


def exact(
    student: list[float], teacher: list[float], factors: list[float] | None = None, alpha: float = 1.0
) -> list[float]:
    """The two equations as they are printed, in decimal; Eq. 1 where there are no factors."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 60, 10**9, -(10**9)
        ratios = [Decimal(s) / Decimal(t) for s, t in zip(student, teacher, strict=True)]
        past = [Decimal(1)] * len(ratios) if factors is None else [Decimal(r) for r in factors]
        psi = [r * ratio.exp() for r, ratio in zip(past, ratios, strict=True)]
        share, rest = Decimal(alpha), (1 - Decimal(alpha)) / len(psi)
        return [float(share * value / sum(psi) + rest) for value in psi]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_eq1_is_exact(case: tuple[list[float], list[float], list[float]]) -> None:
    student, teacher, _ = case
    found = initial_factors(student, teacher)
    assert found.dtype == np.float64
    assert np.abs(found - exact(student, teacher)).max() <= TOLERANCE
    assert abs(math.fsum(found) - 1) <= TOLERANCE


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(), st.floats(0, 1))
def test_eq2_is_exact(case: tuple[list[float], list[float], list[float]], alpha: float) -> None:
    student, teacher, factors = case
    found = smooth_update(factors, student, teacher, alpha=alpha)
    assert np.abs(found - exact(student, teacher, factors, alpha)).max() <= TOLERANCE
    assert abs(math.fsum(found) - 1) <= TOLERANCE
    assert found.min() >= (1 - alpha) / len(factors)


@pytest.mark.parametrize("ratio", [1e-4, 1.0, 710.0, 1e4])
def test_extreme_ratios_stay_finite(ratio: float) -> None:
    student, teacher = [ratio, 1.0, 2.0], [1.0, 1.0, 1.0]
    for found in (
        initial_factors(student, teacher),
        smooth_update([1 / 3] * 3, student, teacher, alpha=0.5),
        smooth_update([0.0, 1.0, 0.0], student, teacher, alpha=1.0),
    ):
        assert np.isfinite(found).all()
        assert math.fsum(found) == pytest.approx(1, abs=TOLERANCE)


def test_floor_of_eq2_is_reached_and_left_again() -> None:
    floor = 0.5 / 3
    starved = smooth_update([1 / 3] * 3, [1e4, 1.0, 1.0], [1.0, 1.0, 1.0], alpha=0.5)
    assert starved == pytest.approx([0.5 + floor, floor, floor], abs=TOLERANCE)
    recovered = smooth_update(starved, [1.0, 1e4, 1.0], [1.0, 1.0, 1.0], alpha=0.5)
    assert recovered == pytest.approx([floor, 0.5 + floor, floor], abs=TOLERANCE)


def test_zero_factor_has_no_psi() -> None:
    found = smooth_update([0.0, 0.5, 0.5], [1e4, 1.0, 1.0], [1.0, 1.0, 1.0], alpha=1.0)
    assert found.tolist() == [0.0, 0.5, 0.5]


def test_ratio_cap_bounds_the_ratio_before_exp() -> None:
    capped = exact([2.0, 1.5, 1.8], [1.0, 1.0, 1.0])
    assert initial_factors(STUDENT, TEACHER, ratio_cap=2.0) == pytest.approx(capped, abs=TOLERANCE)
    past = [0.2, 0.3, 0.5]
    found = smooth_update(past, STUDENT, TEACHER, alpha=0.4, ratio_cap=2.0)
    assert found == pytest.approx(exact([2.0, 1.5, 1.8], [1.0, 1.0, 1.0], past, 0.4), abs=TOLERANCE)


def test_floor_of_eq1() -> None:
    plain = initial_factors(STUDENT, TEACHER)
    assert initial_factors(STUDENT, TEACHER, floor=0.1) == pytest.approx(0.1 + 0.7 * plain, abs=TOLERANCE)
    assert initial_factors(STUDENT, TEACHER, floor=1 / 3) == pytest.approx([1 / 3] * 3, abs=TOLERANCE)


@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize("bad", [math.nan, -2.0, 0.0, math.inf, None])
def test_bad_perplexity_is_refused_with_its_domain(model: str, bad: float | None) -> None:
    columns: dict[str, list[float | None]] = {"student": [*STUDENT], "teacher": [*TEACHER]}
    columns[model][1] = bad
    shown = "missing" if bad is None else repr(bad)
    message = f"the {model}'s perplexity of domain 'code' is {shown}"
    with pytest.raises(DataError, match=message):
        initial_factors(columns["student"], columns["teacher"], names=NAMES)
    with pytest.raises(DataError, match=message):
        smooth_update([1 / 3] * 3, columns["student"], columns["teacher"], alpha=0.5, names=NAMES)
    with pytest.raises(DataError, match=message):
        discrepancy(columns["student"], columns["teacher"], names=NAMES)


def test_lengths_of_perplexities_are_checked() -> None:
    with pytest.raises(DataError, match="teacher's perplexities are missing"):
        initial_factors(STUDENT, None)
    with pytest.raises(DataError, match="student's perplexities are empty"):
        initial_factors([], [])
    with pytest.raises(DataError, match="perplexity of domain 'math' is missing"):
        check_perplexities(STUDENT[:2], model="student", names=NAMES)
    with pytest.raises(DataError, match="4 perplexities for 3 domains"):
        check_perplexities([*STUDENT, 1.0], model="student", names=NAMES)
    with pytest.raises(DataError, match="3 perplexities of the student, 2 of the teacher"):
        initial_factors(STUDENT, TEACHER[:2])
    with pytest.raises(DataError, match="domain 0 overflows"):
        initial_factors([1e308], [1e-10])


@pytest.mark.parametrize("ratio_cap", [0.0, -1.0, math.nan, math.inf])
def test_bad_ratio_cap_is_refused(ratio_cap: float) -> None:
    with pytest.raises(ConfigError, match=r"mixture\.ratio_cap"):
        initial_factors(STUDENT, TEACHER, ratio_cap=ratio_cap)


@pytest.mark.parametrize("floor", [-0.01, 0.34, math.nan])
def test_bad_floor_is_refused(floor: float) -> None:
    with pytest.raises(ConfigError, match=r"mixture\.initial_floor"):
        initial_factors(STUDENT, TEACHER, floor=floor)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_bad_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"mixture\.alpha"):
        smooth_update([1 / 3] * 3, STUDENT, TEACHER, alpha=alpha)


@pytest.mark.parametrize("factors", [[0.5, 0.5], [0.5, 0.4, 0.0], [1.5, -0.5, 0.0], [math.nan, 0.5, 0.5]])
def test_bad_factors_are_refused(factors: list[float]) -> None:
    with pytest.raises(ConfigError, match="the factors r_t"):
        smooth_update(factors, STUDENT, TEACHER, alpha=0.5)


def test_discrepancy_is_the_largest_excess() -> None:
    assert discrepancy(STUDENT, TEACHER) == 1.5
    assert discrepancy([1.0, 2.0], [2.0, 4.0]) == -0.5


def test_one_hot_start_is_warned_about() -> None:
    factors = initial_factors([5.0, 40.0, 6.0], [1.0, 1.0, 1.0])
    warning = one_hot_warning(factors, NAMES)
    assert is_nearly_one_hot(factors)
    assert warning is not None
    assert all(part in warning for part in ("100.0%", "'code'", "ratio_cap", "initial_floor"))
    assert one_hot_warning(initial_factors([5.0, 40.0, 6.0], [1.0] * 3, ratio_cap=5.0), NAMES) is None
    assert one_hot_warning(initial_factors(STUDENT, TEACHER), NAMES) is None
    assert one_hot_warning([1.0], ["web"]) is None
