"""Statistics of a comparison: spread over seeds, paired t-tests, Holm's correction for many of them, and a ranking."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

LEVEL = 0.05
"""Probability of a difference where there is none, for a test alone and for all tests of a table together."""


@dataclass(frozen=True)
class Spread:
    """Mean and spread of one quantity over seeds."""

    mean: float
    sd: float | None
    """Sample standard deviation (n - 1); None with one value."""
    values: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """Difference of one quantity between a method and the baseline, paired by seed."""

    seeds: int
    """Seeds that both have."""
    mean: float | None
    """Method minus baseline; None without a common seed."""
    standard_error: float | None
    low: float | None
    """Lower end of the mean's 95 % t interval; None with fewer than two seeds."""
    high: float | None
    """Upper end of that interval."""
    verdict: str
    """Sentence about the difference and the spread, for the report."""
    p: float | None = None
    """Two-sided p of the paired t-test; None with fewer than two seeds."""
    p_holm: float | None = None
    """The same after `corrected`."""


def spread(values: Iterable[float]) -> Spread:
    """Return the mean and the sample standard deviation, which is None for a single value."""
    array = np.array(list(values), np.float64)
    return Spread(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None, tuple(array.tolist()))


def t_test_p(t: float, degrees: int) -> float:
    """Return the two-sided p of Student's t, by its finite series (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Its error is that of 1 - (1 - p) in float64: 1e-16, not relative to p.
    """
    angle = math.atan(abs(t) / math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for number in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (number - 1) / number
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return max(0.0, 1.0 - inside)


def t_quantile(degrees: int) -> float:
    """Return the two-sided 95 % quantile of Student's t, by bisection of `t_test_p`."""
    low, high = 0.0, 16.0  # the largest, of 1 degree of freedom, is 12.7
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_test_p(middle, degrees) > LEVEL else (low, middle)
    return low


def paired_difference(method: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Compare values by seed over the seeds that both have: method minus baseline, with a paired t-test."""
    seeds = sorted(method.keys() & baseline.keys())
    if not seeds:
        return Difference(0, None, None, None, None, "no seed in common")
    differences = spread(method[seed] - baseline[seed] for seed in seeds)
    if differences.sd is None:
        return Difference(1, differences.mean, None, None, None, "one seed: no spread is known")
    mean, error = differences.mean, differences.sd / math.sqrt(len(seeds))
    half = t_quantile(len(seeds) - 1) * error
    p = t_test_p(mean / error, len(seeds) - 1) if error else float(mean == 0)
    verdict = "exceeds the spread" if p < LEVEL else "does not exceed the spread"
    return Difference(len(seeds), mean, error, mean - half, mean + half, verdict, p)


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences with Holm's correction (Scandinavian Journal of Statistics 6, 1979) for all of them.

    Of m tests the one with the i-th smallest p (i from 0) gets p_holm = (m - i) p, at most 1, and no less than the one
    before. Where all p_holm below `LEVEL` are called differences, the probability that any of them is none is `LEVEL`
    at most, however the tests depend on one another. A difference without a p is no test.
    """
    tests = [(one.p, number) for number, one in enumerate(differences) if one.p is not None]
    found, largest = list(differences), 0.0
    for place, (p, number) in enumerate(sorted(tests)):
        largest = max(largest, min(1.0, (len(tests) - place) * p))
        verdict = found[number].verdict
        if p < LEVEL <= largest:
            verdict = "exceeds the spread alone, not after the correction"
        found[number] = replace(found[number], p_holm=largest, verdict=verdict)
    return found


def ranking(scores: Mapping[str, Mapping[int, float]]) -> dict[str, Any] | None:
    """Rank methods by a score, of which less is better, over the seeds that all have; None if there is nothing to rank.

    `scores` has each method's score by seed. The result has the `seeds` and the `places` from the best mean on: the
    `label`, the `ranks` by seed (1 is the best; equal scores share the mean of their ranks), and `to_next`, the paired
    difference from this method to the next, corrected for all such pairs.
    """
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in scores.values())))
    if len(scores) < 2 or not seeds:
        return None
    labels = sorted(scores, key=lambda label: math.fsum(scores[label][seed] for seed in seeds))
    common = {label: {seed: scores[label][seed] for seed in seeds} for label in labels}
    pairs = [paired_difference(common[worse], common[label]) for label, worse in pairwise(labels)]
    to_next: list[Difference | None] = [*corrected(pairs), None]
    columns = [_ranks([common[label][seed] for label in labels]) for seed in seeds]
    places = [
        {"label": label, "ranks": list(ranks), "to_next": pair and asdict(pair)}
        for label, ranks, pair in zip(labels, zip(*columns, strict=True), to_next, strict=True)
    ]
    return {"seeds": seeds, "places": places}


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < one for other in values) + (values.count(one) + 1) / 2 for one in values]
