"""Counts over many intervals: rounding is made up for, so every domain keeps within one sample of what is due to it.

What is due is computed here with 50 digits: the sum over the intervals of proportion times samples.
"""

from __future__ import annotations

import json
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from ddk_ds.mixture.exhaustion import largest_remainder
from ddk_ds.mixture.interval_state import DomainEntry, IntervalState
from tests.unit.mixture.mixture_section import exhaustion_of

INTERVALS = 1000
DIGITS = 50


def fresh(num_domains: int) -> IntervalState:
    entries = [DomainEntry(name=f"domain{i}", num_samples=10**6, sha="0") for i in range(num_domains)]
    return IntervalState.new(entries, seed=0)


def largest_gap(proportions: np.ndarray, totals: list[int]) -> Decimal:
    """Return the largest difference between the samples drawn and due, over all domains and intervals.

    Every interval goes through a checkpoint, as if each had a start of its own.
    """
    state = fresh(proportions.shape[1])
    due = [Decimal(0)] * proportions.shape[1]
    largest = Decimal(0)
    for row, total in zip(proportions, totals, strict=True):
        exact = [Decimal(float(value)) for value in row]
        with localcontext(prec=DIGITS):
            whole = sum(exact)
            due = [a + b * total / whole for a, b in zip(due, exact, strict=True)]
        state = IntervalState.from_json(json.loads(json.dumps(state.to_json())))
        state = state.advance(row, total).consume(total)
        assert state.total == total and min(state.counts) >= 0
        with localcontext(prec=DIGITS):
            largest = max(largest, *(abs(a - b) for a, b in zip(due, state.drawn, strict=True)))
    return largest


@pytest.mark.parametrize(
    ("proportions", "total", "drawn"),
    [
        ([0.4995, 0.4995, 0.001], 320, [159_840, 159_840, 320]),
        ([1 / 3] * 3, 100, [33_334, 33_333, 33_333]),
        ([1 / 7] * 7, 300, [42_858, 42_857, 42_857, 42_857, 42_857, 42_857, 42_857]),
        ([1 / 40] * 40, 8, [200] * 40),  # fewer samples than domains
    ],
)
def test_constant_proportions(proportions: list[float], total: int, drawn: list[int]) -> None:
    rows = np.array([proportions] * INTERVALS)
    assert largest_gap(rows, [total] * INTERVALS) < 1
    state = fresh(len(proportions))
    for _ in range(INTERVALS):
        state = state.advance(proportions, total).consume(total)
    assert sorted(state.drawn, reverse=True) == sorted(drawn, reverse=True)


@pytest.mark.parametrize("num_domains", [2, 3, 10, 100])
def test_proportions_and_lengths_that_change_in_every_interval(num_domains: int) -> None:
    rng = np.random.default_rng(num_domains)
    # As Eq. 2 makes them: a part of 1 / N is left to each, which is at least one sample here.
    rows = 0.5 * rng.dirichlet(np.full(num_domains, 0.1), INTERVALS) + 0.5 / num_domains
    totals = rng.integers(2 * num_domains, 50 * num_domains, INTERVALS).tolist()
    assert largest_gap(rows, totals) < 1


@pytest.mark.parametrize("num_domains", [3, 10])
@pytest.mark.parametrize("total", [1, 7, 64])
def test_any_proportions(num_domains: int, total: int) -> None:
    """Even where domains come and go at less than a sample in an interval, the gap does not grow with time."""
    rng = np.random.default_rng([num_domains, total])
    rows = rng.dirichlet(np.full(num_domains, 0.2), INTERVALS) * (rng.random((INTERVALS, num_domains)) < 0.7)
    rows[rows.sum(1) == 0, 0] = 1.0
    rows /= rows.sum(1, keepdims=True)
    assert largest_gap(rows, [total] * INTERVALS) < 1.5


def test_what_is_owed_waits_while_the_proportion_is_0() -> None:
    assert largest_remainder([0.0, 0.5, 0.5], 3, [0.75, -0.5, -0.25]).tolist() == [0, 1, 2]
    assert largest_remainder([0.25, 0.5, 0.25], 3, [0.75, -0.5, -0.25]).tolist() == [2, 1, 0]


def test_a_domain_drawn_too_often_before_pays_back() -> None:
    assert largest_remainder([0.01, 0.99], 10, [-0.75, 0.75]).tolist() == [0, 10]
    # More than one domain owes: the others cannot have their whole parts, and the smallest remainders give.
    owed = [-0.75, -0.75, -0.75, 0.75, 0.75, 0.75]
    assert largest_remainder([0, 0, 0, 0.25, 0.35, 0.4], 3, owed).tolist() == [0, 0, 0, 1, 1, 1]


def test_after_a_cap_the_others_have_its_share_within_one_sample() -> None:
    """From its cap on, code has what it drew; the others have what is left of each interval by their proportions."""
    shares, total, cap = [Fraction(1, 2), Fraction(3, 16), Fraction(5, 16)], 33, 1000
    proportions = [float(share) for share in shares]
    exhaustion = exhaustion_of(
        {"code": cap, "maths": 50, "prose": 50}, exhaustion_by_domain={"code": "cap"}, max_passes=1
    )
    state, due = fresh(3), [Fraction(0)] * 3
    for interval in range(INTERVALS):
        draws = exhaustion.draws(proportions, total, state.drawn, state.owed)
        state = state.begin(draws.counts, draws.owed).consume(total)
        due = [a + share * total for a, share in zip(due, shares, strict=True)]
        if due[0] > cap:
            given, due[0] = due[0] - cap, Fraction(cap)
            due[1:] = [
                a + given * share / (shares[1] + shares[2]) for a, share in zip(due[1:], shares[1:], strict=True)
            ]
        assert max(abs(a - b) for a, b in zip(due, state.drawn, strict=True)) < 1, interval
    assert state.drawn[0] == cap
