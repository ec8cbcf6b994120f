"""The mixture where something is exactly 0, exactly full, or one sample over, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ddk_ds.errors import ConfigError, DataError
from ddk_ds.mixture.bounds import floors_in_order, raise_to_floors
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.ddk import DDK, initial_factors
from ddk_ds.mixture.decide import Decision, decide
from ddk_ds.mixture.domain_vectors import (
    Factors,
    check_perplexities,
    check_proportions,
    proportions_by_size,
    proportions_in_order,
    softmax,
    values_in_order,
)
from ddk_ds.mixture.exhaustion import Exhaustion, largest_remainder
from ddk_ds.mixture.fixed import parse_stages
from ddk_ds.mixture.interval_state import IntervalState
from ddk_ds.mixture.order import DomainOrder, check_seed
from tests.unit.mixture.mixture_section import section


def test_floors_that_take_all_leave_nothing_to_the_others() -> None:
    raised = raise_to_floors([0.5, 0.5, 0.0], Factors.of(np.array([0.25, 0.25, 0.5])))
    assert raised.proportions.tolist() == [0.5, 0.5, 0.0]
    assert raised.logs.tolist() == [math.log(0.5), math.log(0.5), -math.inf]


def test_floors_may_sum_to_exactly_1() -> None:
    assert floors_in_order({"b": 0.75, "a": 0.25}, ["a", "b", "c"], ()) == (0.25, 0.75, 0.0)
    with pytest.raises(ConfigError, match=r"sum 1\.25"):
        floors_in_order({"b": 0.75, "a": 0.5}, ["a", "b"], ())


def test_no_interval_gives_samples_back() -> None:
    state = IntervalState.new([{"name": "a", "num_samples": 4, "sha": "0"}], seed=0).begin([4], [0.0]).consume(3)
    for wrong in (-1, 2):
        with pytest.raises(AssertionError, match=f"{3 + wrong} of 4 samples"):
            state.consume(wrong)
    assert (state.consume(0).consumed, state.consume(1).consumed) == (3, 4)


def test_a_block_ends_with_the_shard_that_fills_it() -> None:
    """Four shards of 2 samples: a block of 2 is one shard, a block of 3 is two, whose samples come in any order."""
    one_each, mixed = (DomainOrder("prose", [2, 2, 2, 2], 7, block) for block in (2, 3))
    for draw in range(0, 400, 2):  # 50 passes
        assert len(one_each.shards_of(draw, draw + 2)) == 1
        if draw % 4 == 0:
            assert len(mixed.shards_of(draw, draw + 4)) == 2
    begins = [len(mixed.shards_of(first, first + 2)) for first in range(0, 400, 8)]
    assert begins.count(2) > 10  # of 50; two in three are expected


def test_a_floor_of_all_that_there_is_gives_equal_proportions() -> None:
    """A floor that was rounded up: nothing is left for the softmax, not less than nothing."""
    floor = 1 / 3 + 1e-13
    assert initial_factors(np.array([3.0, 2.0, 1.0]), floor=floor).proportions.tolist() == [floor] * 3


def test_a_domain_without_a_proportion_stays_without_one() -> None:
    """Eq. 2 with alpha 1 multiplies by exp(2), exp(1) and exp(3): 0 stays 0, the others are e : 1."""
    controller = make_controller(section(alpha=1.0), {"a": 1, "b": 1, "c": 1})
    last = Decision([0.5, 0.5, 0.0], [], [math.log(0.5), math.log(0.5), None])
    decision = decide(controller, last, np.array([2.0, 1.0, 3.0]), np.ones(3), interval=1)
    assert decision.proportions == pytest.approx([math.e / (math.e + 1), 1 / (math.e + 1), 0.0])
    assert decision.log_proportions[2] is None


def test_a_default_stands_for_domains_that_are_not_named() -> None:
    assert values_in_order({"b": 2.0}, ["a", "b"], label="floors", quantity="floor", default=0.5) == [0.5, 2.0]


@pytest.mark.parametrize("block", [1, 2, 3])
def test_as_many_samples_are_drawn_as_were_asked_for_wherever_a_block_begins(block: int) -> None:
    order = DomainOrder("prose", [1, 2, 1, 3], 5, block)
    with pytest.raises(AssertionError, match="draws -1"):
        order.take(-1, 0)
    whole = order.take(0, 21).tolist()
    assert [sorted(whole[first : first + 7]) for first in (0, 7, 14)] == [list(range(7))] * 3
    for start in range(14):
        for stop in range(start, 15):
            assert order.take(start, stop).tolist() == whole[start:stop]


def test_more_whole_samples_due_than_there_are() -> None:
    """Due are -1.5, 2 and 3.5 of 4: the two whole ones are a sample too many, and the one that lacks less gives it."""
    counts = largest_remainder([0.25, 0.25, 0.5], 4, [-2.5, 1.0, 1.5])
    assert counts.tolist() == [0, 1, 3]
    # Due are -3, 2.25, 2.75 and 3 of 5: whole are 2, 2 and 3, two too many.
    assert largest_remainder([0.2] * 5, 5, [-4.0, 1.25, 1.75, 2.0, -1.0]).tolist() == [0, 1, 2, 2, 0]


def test_proportions_sum_to_1_within_a_millionth() -> None:
    def refused(*values: float) -> bool:
        try:
            check_proportions(values, num_domains=2, label="these")
        except ConfigError:
            return True
        return False

    assert not refused(0.0, 1.0) and not refused(0.5, 0.5 + 9e-7) and not refused(0.5, 0.5 - 9e-7)
    assert refused(0.5, 0.5 + 2e-6) and refused(0.5, 0.5 - 2e-6) and refused(-0.5, 1.5) and refused(0.5, math.nan)
    assert refused(1.0) and refused(0.5, 0.25, 0.25)


def test_a_perplexity_is_any_positive_number() -> None:
    assert check_perplexities([0.5, 1e-300, 1.0, 1e300], model="student").tolist() == [0.5, 1e-300, 1.0, 1e300]
    assert check_perplexities([2.0], model="student", names=["a"]).tolist() == [2.0]
    for values in ([], None, [0.0], [-1.0], [math.inf], [math.nan], [2.0, None]):
        with pytest.raises(DataError):
            check_perplexities(values, model="student")
    for values in ([2.0], [2.0, 3.0, 4.0]):
        with pytest.raises(DataError):
            check_perplexities(values, model="student", names=["a", "b"])


def test_a_domain_of_one_sample_has_its_share() -> None:
    assert proportions_by_size(["a", "b"], {"a": 1, "b": 3, "c": 9}) == (0.25, 0.75)
    with pytest.raises(ConfigError, match="'b' has size 0"):
        proportions_by_size(["a", "b"], {"a": 1, "b": 0})


def test_an_excluded_domain_has_no_proportion_but_0() -> None:
    given = {"a": 0.25, "b": 0.75, "c": 0.0}
    assert proportions_in_order(given, ["c", "a", "b"], ["c"], label="these") == (0.25, 0.75)
    assert proportions_in_order({"a": 0.25, "b": 0.75}, ["c", "a", "b"], ["c"], label="these") == (0.25, 0.75)
    for value in (1.0, -1.0):
        with pytest.raises(ConfigError, match="exclude names it"):
            proportions_in_order({**given, "c": value}, ["c", "a", "b"], ["c"], label="these")


def test_the_log_of_no_proportion_is_minus_infinity() -> None:
    assert Factors.of(np.array([0.0, 1.0])).logs.tolist() == [-math.inf, 0.0]
    assert Factors.of(np.array([0.0, 1.0]), np.array([-1000.0, 5.0])).logs.tolist() == [-1000.0, 0.0]


def test_controllers_without_perplexities_smooth_none_and_need_no_teacher() -> None:
    stages = [{"from_interval": t, "proportions": {"a": share, "b": 1 - share}} for t, share in ((0, 0.5), (1, 0.25))]
    for options in ({"controller": "equal"}, {"controller": "schedule", "schedule_file": "stages.yaml"}):
        controller = make_controller(section(**options), {"a": 1, "b": 3}, stages)
        decision = decide(controller, None, np.array([2.0, 3.0]), None, interval=0)
        assert (decision.proportions, decision.smoothed_ppl, controller.uses_teacher) == ([0.5, 0.5], [], False)


@pytest.mark.parametrize("first", [[0, 5, 3], [0, 3, 3], [0, 0], [1], [-1], [0, True], [0, 1.5]])
def test_stages_begin_with_0_and_rise(first: list[Any]) -> None:
    stages = [{"from_interval": t, "proportions": {"a": 1.0}} for t in first]
    with pytest.raises(ConfigError, match="from_interval is") as caught:
        parse_stages(stages, ["a"], (), source="stages.yaml")
    assert f"stages.yaml, entry {len(first)}:" in str(caught.value)


def test_a_stages_proportions_are_numbers() -> None:
    for value in (True, "0.5", None):
        with pytest.raises(ConfigError, match="entry 1: the proportion of 'b' is"):
            parse_stages([{"from_interval": 0, "proportions": {"a": 1, "b": value}}], ["a", "b"], (), source="x")
    parsed = parse_stages([{"from_interval": 0, "proportions": {"a": 1, "b": 0.0}}], ["a", "b"], (), source="x")
    assert parsed == ((0, (1.0, 0.0)),)


def test_the_log_of_a_share_that_underflows_is_normalised_too() -> None:
    """exp(-800) of exp(0) + exp(0) + exp(-800), a sum of 2."""
    assert softmax(np.array([0.0, 0.0, -800.0])).logs == pytest.approx([-math.log(2), -math.log(2), -800 - math.log(2)])


def test_the_first_interval_is_eq_1s_and_the_others_eq_2s() -> None:
    controller = make_controller(section(), {"a": 1, "b": 1})
    assert isinstance(controller, DDK)
    assert controller.spreading(0) == ("ratio_cap", "initial_floor")
    assert controller.spreading(1) == controller.spreading(7) == ("ratio_cap", "alpha")


def test_a_seed_has_64_bits() -> None:
    check_seed(2**64 - 1, 1)
    for seed in (-1, 2**64):
        with pytest.raises(ConfigError, match="seed"):
            check_seed(seed, 1)


@pytest.mark.parametrize("cap", [None, 1])
def test_a_proportion_of_0_draws_nothing_also_where_samples_are_due(cap: int | None) -> None:
    """Due are 0.9, 1.05 and 1.05 samples of 3; the second domain may be at its cap, which leaves 1 to the third."""
    policy = "cycle" if cap is None else "cap"
    exhaustion = Exhaustion(("a", "b", "c"), ("cycle", policy, "cycle"), (None, cap, None))
    draws = exhaustion.draws([0.0, 0.5, 0.5], 3, [0, 0, 0], (0.9, -0.45, -0.45))
    assert draws.asked[0] == draws.counts[0] == 0 and sum(draws.counts) == 3
    assert draws.owed[0] == 0.9
