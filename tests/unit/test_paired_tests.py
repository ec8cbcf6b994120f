"""The statistics of a comparison as computed by hand, by scipy and by published tables."""

from __future__ import annotations

import math

import pytest

from ddk_ds.comparison.paired_tests import (
    Difference,
    corrected,
    paired_difference,
    ranking,
    spread,
    t_quantile,
    t_test_p,
)


def test_mean_and_sample_standard_deviation() -> None:
    found = spread([2.0, 4.0, 9.0])  # mean 5, squares 9 + 1 + 16 = 26, over 2: 13
    assert found.mean == 5.0
    assert found.sd == pytest.approx(math.sqrt(13.0), rel=1e-14)
    assert spread([3.0]).sd is None


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (4, 2.7764), (10, 2.2281), (11, 2.2010), (15, 2.1314), (30, 2.0423), (120, 1.9799)],
)
def test_quantiles_are_those_of_published_tables(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(
    ("t", "degrees", "expected"),
    [
        (1.0, 1, 0.5),  # the Cauchy distribution's quartile
        (-2.0, 1, 0.2951672353008665),  # the others are scipy 1.17's, 2 * stats.t.sf(t, degrees)
        (1.5, 2, 0.2723931248910011),
        (2.5, 3, 0.08770664700806556),
        (0.3, 4, 0.7791214282774598),
        (5.0, 5, 0.004104715980053323),
        (8.0, 10, 1.1774942789666167e-05),
        (4.0, 29, 0.00040006394565249173),
    ],
)
def test_p_of_students_t(t: float, degrees: int, expected: float) -> None:
    assert t_test_p(t, degrees) == pytest.approx(expected, rel=1e-9)


def difference_with(p: float | None) -> Difference:
    """A difference of which the p alone matters."""
    verdict = "exceeds the spread" if p is not None and p < 0.05 else "does not exceed the spread"
    return Difference(3, -1.0, 0.1, -1.5, -0.5, verdict, p)


def test_many_tests_are_corrected_by_holm() -> None:
    # By hand, and as R's p.adjust(c(.01, .04, .03, .005), "holm") has it: .005 x 4, .01 x 3, .03 x 2, then no less.
    found = corrected([difference_with(p) for p in (0.01, 0.04, 0.03, None, 0.005)])
    assert [one.p_holm for one in found] == [pytest.approx(0.03), pytest.approx(0.06), pytest.approx(0.06), None, 0.02]
    after = "exceeds the spread alone, not after the correction"
    assert [one.verdict.replace(after, "alone") for one in found] == [
        *("exceeds the spread", "alone", "alone", "does not exceed the spread", "exceeds the spread")
    ]
    assert [one.p_holm for one in corrected([difference_with(0.9), difference_with(0.6)])] == [1.0, 1.0]


def test_equal_runs_do_not_differ() -> None:
    same = paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert (same.p, same.verdict) == (1.0, "does not exceed the spread")


def test_a_ranking_says_which_neighbours_are_apart() -> None:
    scores = {
        "c": {0: 3.0, 1: 3.2, 2: 3.1, 3: 9.0},
        "a": {0: 1.0, 1: 1.2, 2: 1.1},
        "b": {0: 1.1, 1: 1.1, 2: 1.4},
        "d": {0: 3.0, 1: 3.3, 2: 3.1},
    }
    found = ranking(scores)
    assert found is not None and found["seeds"] == [0, 1, 2]
    places = {place["label"]: place for place in found["places"]}
    assert list(places) == ["a", "b", "c", "d"]
    assert [places[label]["ranks"] for label in "abcd"] == [[1, 2, 1], [2, 1, 2], [3.5, 3, 3.5], [3.5, 4, 3.5]]
    # b - a: 0.1, -0.1, 0.3; c - b: 1.9, 2.1, 1.7, so mean 1.9, standard error 0.2 / sqrt(3), t 16.45, p 0.0036743.
    assert places["a"]["to_next"]["mean"] == pytest.approx(0.1)
    assert places["b"]["to_next"]["p_holm"] == pytest.approx(3 * 0.0036743, rel=1e-3)
    assert places["a"]["to_next"]["p_holm"] == pytest.approx(2 * 0.4226497, rel=1e-6)
    assert places["d"]["to_next"] is None
    assert ranking({"a": {0: 1.0}}) is None and ranking({"a": {0: 1.0}, "b": {1: 1.0}}) is None


def test_differences_are_paired_by_seed() -> None:
    # Differences 1, 2, 3: mean 2, sd 1, standard error 1 / sqrt(3), interval 2 -+ 4.3027 / sqrt(3) = -0.484 .. 4.484.
    wide = paired_difference({0: 11.0, 1: 22.0, 2: 33.0}, {2: 30.0, 1: 20.0, 0: 10.0, 7: 99.0})
    assert (wide.seeds, wide.mean) == (3, 2.0)
    assert wide.standard_error == pytest.approx(1 / math.sqrt(3))
    assert (wide.low, wide.high) == (pytest.approx(-0.48416, abs=1e-4), pytest.approx(4.48416, abs=1e-4))
    assert wide.verdict == "does not exceed the spread"
    # Unpaired, the seeds' own differences of 10 would hide this one.
    close = paired_difference({0: 12.0, 1: 22.1, 2: 31.9}, {0: 10.0, 1: 20.0, 2: 30.0})
    assert close.verdict == "exceeds the spread"
    lower = paired_difference({0: 8.0, 1: 18.1}, {0: 10.0, 1: 20.0})
    assert (lower.low, lower.high) == (pytest.approx(-2.5853, abs=1e-3), pytest.approx(-1.3147, abs=1e-3))
    assert lower.verdict == "exceeds the spread"


def test_without_seeds_no_spread_is_known() -> None:
    one = paired_difference({0: 3.0, 1: 5.0}, {1: 1.0})
    assert (one.seeds, one.mean, one.standard_error, one.low) == (1, 4.0, None, None)
    assert one.verdict == "one seed: no spread is known"
    assert paired_difference({0: 3.0}, {1: 1.0}).verdict == "no seed in common"
