"""Exhaustion policies: the samples of a domain at its limit, and the end of a run at such a limit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_ds.errors import ConfigError
from ddk_ds.mixture.exhaustion import Exhausted, Exhaustion, largest_remainder
from tests.unit.mixture.mixture_section import exhaustion_of

NAMES = ("code", "maths", "prose")


def build(sizes: list[int], **options: Any) -> Exhaustion:
    return exhaustion_of(dict(zip(NAMES, sizes, strict=True)), **options)


def counts_of(exhaustion: Exhaustion, proportions: list[float], total: int, drawn: list[int]) -> tuple[int, ...]:
    """Return the counts where nothing is owed from before."""
    return exhaustion.draws(proportions, total, drawn, ()).counts


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[int], np.ndarray, list[str]]:
    """Draw sizes, proportions (which can be 0) and policies of 1 to 6 domains."""
    num_domains = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 300), min_size=num_domains, max_size=num_domains))
    weights = draw(st.lists(st.integers(0, 9), min_size=num_domains, max_size=num_domains).filter(any))
    policies = draw(st.lists(st.sampled_from(["cycle", "cap", "stop"]), min_size=num_domains, max_size=num_domains))
    return sizes, np.array(weights) / sum(weights), policies


@settings(deadline=None, max_examples=300)
@given(mixtures(), st.integers(1, 200), st.sampled_from([0.5, 1, 2.5]))
def test_no_limit_is_ever_passed(
    mixture: tuple[list[int], np.ndarray, list[str]], total: int, max_passes: float
) -> None:
    sizes, proportions, policies = mixture
    names = [f"domain{i}" for i in range(len(sizes))]
    sizes = [size + 1 for size in sizes]  # half a pass is at least one sample
    limited = {"max_passes": max_passes} if set(policies) != {"cycle"} else {}
    by_domain = dict(zip(names, policies, strict=True))
    exhaustion = exhaustion_of(dict(zip(names, sizes, strict=True)), exhaustion_by_domain=by_domain, **limited)
    limits = [np.inf if p == "cycle" else int(n * max_passes) for p, n in zip(policies, sizes, strict=True)]
    drawn, owed = np.zeros(len(sizes), np.int64), (0.0,) * len(sizes)
    for _ in range(40):
        try:
            draws = exhaustion.draws(proportions, total, drawn.tolist(), owed)
        except Exhausted:
            break
        counts = np.array(draws.counts)
        assert draws.asked == tuple(largest_remainder(proportions, total, owed))
        if "cap" not in policies:
            assert draws.counts == draws.asked
        assert counts.sum() == total and (counts >= 0).all()
        drawn += counts
        assert (drawn <= limits).all()
        full = np.array([p == "cap" for p in policies]) & (drawn == limits)
        # The domains below their cap have the rest by their proportions: what they are owed never grows.
        owed = draws.owed
        assert abs(sum(owed)) < 1e-6 and max(map(abs, owed)) < 1.5
        assert all(abs(owed[i]) < 1e-6 for i in np.flatnonzero(full & (counts < draws.asked)))
        assert (counts[(proportions == 0)] == 0).all()


def test_cycle_has_no_limit() -> None:
    exhaustion = build([10, 10, 10])
    assert counts_of(exhaustion, [0.2, 0.3, 0.5], 1000, [10**9] * 3) == (200, 300, 500)


def test_a_capped_domain_gives_its_share_by_the_proportions_of_the_others() -> None:
    exhaustion = build([100, 1000, 1000], exhaustion_by_domain={"code": "cap"}, max_passes=2)
    assert exhaustion.limits == (200, None, None)
    assert counts_of(exhaustion, [0.5, 0.3, 0.2], 100, [140, 0, 0]) == (50, 30, 20)
    assert counts_of(exhaustion, [0.5, 0.3, 0.2], 100, [190, 0, 0]) == (10, 54, 36)
    assert counts_of(exhaustion, [0.5, 0.3, 0.2], 100, [200, 0, 0]) == (0, 60, 40)


def test_a_cap_that_another_cap_fills_up() -> None:
    # code has 10 left. Its other 40 samples would take maths to 74 of 50, so prose takes the rest.
    exhaustion = build([10, 50, 1000], exhaustion="cap", max_passes=1)
    assert counts_of(exhaustion, [0.5, 0.3, 0.2], 100, [0, 0, 0]) == (10, 50, 40)


def test_the_run_ends_if_every_domain_is_at_its_cap() -> None:
    exhaustion = build([10, 50, 30], exhaustion="cap", max_passes=1)
    assert counts_of(exhaustion, [0.2, 0.5, 0.3], 90, [0, 0, 0]) == (10, 50, 30)
    with pytest.raises(Exhausted) as exhausted:
        counts_of(exhaustion, [0.2, 0.5, 0.3], 90, [0, 1, 0])
    for part in ("code, maths, prose", "89 samples left", "interval of 90", "mixture.exhaustion: cap"):
        assert part in str(exhausted.value)
    # A domain that cycles but has no proportion takes no samples.
    cycling = build([10, 50, 30], exhaustion="cap", exhaustion_by_domain={"prose": "cycle"}, max_passes=1)
    with pytest.raises(Exhausted):
        counts_of(cycling, [0.5, 0.5, 0.0], 61, [0, 0, 0])
    assert counts_of(cycling, [0.5, 0.4999, 0.0001], 61, [0, 0, 0]) == (10, 50, 1)


def test_stop_ends_the_run_before_the_limit_is_passed() -> None:
    exhaustion = build([100, 50, 100], exhaustion_by_domain={"maths": "stop"})
    assert exhaustion.limits == (None, 50, None)
    assert counts_of(exhaustion, [0.4, 0.3, 0.3], 100, [0, 20, 0]) == (40, 30, 30)
    with pytest.raises(Exhausted) as exhausted:
        counts_of(exhaustion, [0.4, 0.3, 0.3], 100, [0, 21, 0])
    for part in ("'maths'", "29 of 50", "asks for 30", "mixture.exhaustion: stop"):
        assert part in str(exhausted.value)
    assert counts_of(exhaustion, [0.7, 0.0, 0.3], 100, [0, 50, 0]) == (70, 0, 30)  # the proportions ask for none of it


def test_what_a_capped_domain_gives_away_may_stop_the_run() -> None:
    exhaustion = build([20, 50, 100], exhaustion_by_domain={"code": "cap", "maths": "stop"}, max_passes=1)
    assert counts_of(exhaustion, [0.2, 0.5, 0.3], 100, [0, 0, 0]) == (20, 50, 30)
    with pytest.raises(Exhausted, match="asks for 59"):
        counts_of(exhaustion, [0.2, 0.5, 0.3], 100, [15, 0, 0])


@pytest.mark.parametrize(("passes", "limit"), [(0.29, 29), (1, 100), (1.1, 110), (2.5, 250), (1e-2, 1)])
def test_limits_are_exact(passes: float, limit: int) -> None:
    assert exhaustion_of({"a": 100}, exhaustion="cap", max_passes=passes).limits == (limit,)


def test_limits_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"exhaustion_by_domain: 'math' is not a domain .*did you mean 'maths'"):
        build([1, 1, 1], exhaustion_by_domain={"math": "stop"})
    with pytest.raises(ConfigError, match=r"'xyz' is not .* domains are code, maths, prose"):
        build([1, 1, 1], exhaustion_by_domain={"xyz": "stop"})
    with pytest.raises(ConfigError, match=r"max_passes is 0.1: less than one of the 9 samples of domain 'maths'"):
        build([10, 9, 10], exhaustion="cap", max_passes=0.1)
    tight = build([10, 10, 10], exhaustion="cap", max_passes=1)
    tight.check_first(30)
    with pytest.raises(ConfigError, match=r"leaves 30 samples .* first interval needs 31"):
        tight.check_first(31)
    build([10, 10, 10], exhaustion="cap", exhaustion_by_domain={"code": "cycle"}, max_passes=1).check_first(31)
