"""The guard: skipped steps, spikes of the loss and alarms of the mixture, on sequences of losses and ratios."""

from __future__ import annotations

import math
from statistics import NormalDist, median
from typing import Any

import numpy as np
import pytest

from ddk_ds.config import Guard, Mixture
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.decide import decide
from ddk_ds.mixture.interval_state import IntervalState
from ddk_ds.train.guard import NumbersGoneWrong, check_interval, check_step, is_spike
from ddk_ds.train.state import RunState

NAN = math.nan


def fresh() -> RunState:
    entries: Any = [{"name": "a", "num_samples": 4, "sha": "0"}]
    return RunState(data=IntervalState.new(entries, seed=0))


def feed(losses: Any, options: Guard | None = None, norms: Any = None) -> RunState:
    state = fresh()
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        state.step += 1
        check_step(state, float(loss), norm, options or Guard())
    return state


def noisy(count: int) -> list[float]:
    return list(4.0 * np.exp(-np.arange(count) / 200) + np.random.default_rng(0).normal(0, 0.1, count))


def test_a_falling_noisy_loss_is_no_spike() -> None:
    assert feed(noisy(1000)).spikes_in_row == 0


def test_a_new_mixture_that_raises_the_loss_is_no_spike() -> None:
    assert feed([*noisy(200), *(x + 0.8 for x in noisy(200))]).spikes_in_row == 0


def test_a_few_skipped_steps_are_passed_over() -> None:
    state = feed([1.0, NAN, NAN, 1.0, math.inf, 1.0])
    assert (state.skipped_in_row, state.recent_losses) == (0, [1.0, 1.0, 1.0])
    assert feed([1.0, 1.0], norms=[1.0, NAN]).skipped_in_row == 1


@pytest.mark.parametrize("most", [0, 2])
def test_too_many_in_a_row_stop(most: int) -> None:
    with pytest.raises(NumbersGoneWrong, match=f"not finite in {most + 1} steps in a row"):
        feed([1.0, *[NAN] * (most + 1)], Guard(max_skipped_steps=most))
    feed([1.0, *[NAN] * most, 1.0], Guard(max_skipped_steps=most))


def test_spikes_in_a_row_stop_and_a_single_one_does_not() -> None:
    usual = noisy(100)
    state = feed([*usual, 60.0, 60.0, usual[-1]])
    assert state.spikes_in_row == 0 and max(state.recent_losses) < 6
    with pytest.raises(NumbersGoneWrong, match=r"the loss rose to 60 from .*, 3 steps in a row"):
        feed([*usual, 60.0, 60.0, 60.0])
    assert feed([*usual, *[60.0] * 9], Guard(spike_deviations=0.0)).spikes_in_row == 0


def test_a_spike_is_measured_in_robust_standard_deviations() -> None:
    """Half of a normal distribution lies within its median absolute deviation: that is its 0.75 quantile."""
    recent = (4.0 + np.random.default_rng(1).normal(0, 0.5, 64)).tolist()
    options, centre = Guard(spike_deviations=6.0), median(recent)
    limit = 6.0 * median(abs(loss - centre) for loss in recent) / NormalDist().inv_cdf(0.75)
    assert is_spike(recent, centre + 1.001 * limit, options)
    assert not is_spike(recent, centre + 0.999 * limit, options)
    assert not is_spike(recent, centre - 10 * limit, options)
    assert not is_spike(recent[1:], 1e9, options)  # 63 losses are too few


@pytest.mark.parametrize("usual", [100.0, -100.0])
def test_a_loss_that_hardly_varies_has_a_deviation_of_one_percent(usual: float) -> None:
    options = Guard(spike_deviations=2.0)
    assert not is_spike([usual] * 64, usual + 2.0, options)
    assert is_spike([usual] * 64, usual + 2.001, options)


def test_the_last_64_good_losses_are_remembered() -> None:
    losses = [10 - 0.01 * i for i in range(70)]
    assert feed([*losses[:30], NAN, *losses[30:], 60.0]).recent_losses == losses[-64:]


@pytest.mark.parametrize(
    ("bad", "good_step"),
    [([], 80), ([NAN], 80), ([60.0], 80), ([NAN, 60.0, NAN, 60.0], 80), ([60.0, NAN, NAN], 80), ([NAN, 60.0, 4.0], 83)],
)
def test_the_last_good_step_is_before_the_whole_series(bad: list[float], good_step: int) -> None:
    assert feed([*noisy(80), *bad]).good_step == good_step


def test_the_state_goes_through_a_checkpoint() -> None:
    state = feed([*noisy(80), 60.0, NAN])
    again = RunState.from_json(state.to_json())
    assert (again.skipped_in_row, again.spikes_in_row, again.recent_losses) == (1, 1, state.recent_losses)


def alarms(ratios: list[list[float]], proportions: list[float], options: Guard | None = None) -> list[list[str]]:
    """Return the alarms of intervals with these ratios and the same proportions, which DDK has moved."""
    state = fresh()
    state.data = state.data.begin([4], [0.0])
    found = []
    for interval, ratio in enumerate(ratios):
        state.proportions = proportions
        spreading = ("ratio_cap", "alpha" if interval else "initial_floor")
        found.append(check_interval(state, ratio, ["a", "b", "c"], options or Guard(), (), spreading))
        state.data = state.data.consume(4).begin([4], [0.0])
    return found


def test_a_mixture_that_goes_one_hot_raises_an_alarm_in_every_interval() -> None:
    first, second = alarms([[2.0, 2.0, 2.0]] * 2, [0.96, 0.02, 0.02])
    assert len(first) == 1 and "a has 96.0% of interval 0, the entropy is 0.18 of equal" in first[0]
    assert "mixture.ratio_cap and mixture.initial_floor spread it" in first[0]
    assert len(second) == 1 and "mixture.ratio_cap and mixture.alpha spread it" in second[0]
    assert not any(alarms([[2.0, 2.0, 2.0]] * 2, [1.0, 0.0, 0.0], Guard(least_entropy=0.0)))
    assert not any(alarms([[2.0, 2.0, 2.0]] * 2, [0.6, 0.2, 0.2]))


@pytest.mark.parametrize("count", [2, 3, 10])
def test_85_percent_for_one_of_any_number_of_domains_raises_an_alarm(count: int) -> None:
    state, names = fresh(), [str(i) for i in range(count)]
    state.data = state.data.begin([4], [0.0])
    state.proportions = [0.85, *[0.15 / (count - 1)] * (count - 1)]
    assert len(check_interval(state, None, names, Guard(), (), ("floors",))) == 1
    state.proportions = [0.55, *[0.45 / (count - 1)] * (count - 1)]
    assert not check_interval(state, None, names, Guard(), (), ("floors",))


def alarms_of(proportions: list[float], spreading: Any, excluded: Any = (), **options: Any) -> list[str]:
    """Return the alarms of one interval with these proportions in a run without a teacher."""
    state, names = fresh(), [str(i) for i in range(len(proportions))]
    state.proportions = proportions
    return check_interval(state, None, names, Guard(**options), excluded, spreading)


def test_the_entropy_is_compared_with_equal_proportions_of_the_domains_that_are_drawn() -> None:
    """Half and half has the entropy log 2: all of two domains', half of four's."""
    assert alarms_of([0.5, 0.5, 0.0, 0.0], ("floors",), least_entropy=0.5) == []
    found = alarms_of([0.5, 0.5, 0.0, 0.0], ("floors",), least_entropy=0.501)
    assert len(found) == 1 and "0.50 of equal" in found[0]
    assert alarms_of([0.5, 0.5, 0.0, 0.0], ("floors",), ("2", "3"), least_entropy=0.99) == []
    assert alarms_of([0.5, 0.5, 0.0, 0.0], (), least_entropy=0.99) == []  # nothing moves these proportions


def test_the_alarm_names_every_domain_above_an_equal_share() -> None:
    [text] = alarms_of([0.04, 0.45, 0.04, 0.47], ("floors",), least_entropy=0.9)
    assert text.startswith("the mixture is one-sided: 3 has 47.0%, 1 has 45.0% of interval -1, the entropy is 0.70 of")
    [text] = alarms_of([0.85, 0.05, 0.05, 0.05, 0.0], ("floors",), ("4",), least_entropy=0.9)
    assert text.startswith("the mixture is one-sided: 0 has 85.0% of interval")
    # A quarter is the equal share of the four that are drawn.
    [text] = alarms_of([0.7, 0.22, 0.04, 0.04, 0.0], ("floors",), ("4",), least_entropy=0.9)
    assert text.startswith("the mixture is one-sided: 0 has 70.0% of interval")


def test_a_rise_is_counted_from_the_ratio_before() -> None:
    """Equal ratios are no rise, the first interval's have nothing before them, and a fall begins again."""
    state = fresh()
    state.proportions = [0.5, 0.5]
    counted = []
    for ratio in ([2.0, 2.0], [2.0, 2.1], [2.1, 2.2], [2.2, 2.1], [2.3, 2.2]):
        found = check_interval(state, ratio, ["a", "b"], Guard(rising_intervals=2))
        counted.append((state.rises, len(found)))
        assert state.last_ratio == ratio
    assert counted == [([0, 0], 0), ([0, 1], 0), ([1, 2], 1), ([2, 0], 1), ([3, 1], 1)]


RATIOS = (40.0, 5.0, 5.0)


@pytest.mark.parametrize(
    ("section", "first", "later"),
    [
        ({}, "ratio_cap and mixture.initial_floor", "ratio_cap and mixture.alpha"),
        ({"exclude": ("c",)}, "ratio_cap and mixture.initial_floor", "ratio_cap and mixture.alpha"),
        ({"controller": "ddk_no_smoothing"}, "ratio_cap and mixture.initial_floor", "ratio_cap and mixture.initial"),
        ({"controller": "sheared_llama"}, None, "floors"),
        ({"controller": "doremi_online"}, None, "floors"),
        ({"ratio_cap": 6.0, "initial_floor": 0.1}, None, None),
        ({"controller": "static", "proportions": {"a": 0.98, "b": 0.01, "c": 0.01}}, None, None),
        ({"controller": "by_size"}, None, None),
    ],
)
def test_the_alarm_comes_with_every_controller_that_moves_proportions(
    section: dict[str, Any], first: str | None, later: str | None
) -> None:
    options = Mixture(**{"alpha": 0.99, **section})
    controller = make_controller(options, {"a": 9800, "b": 100, "c": 100})
    state, names = fresh(), ["a", "b", "c"]
    last = None
    for interval, expected in enumerate((first, later)):
        last = decide(controller, last, np.array(RATIOS), np.ones(3), interval=interval)
        state.proportions, state.data = last.proportions, state.data.begin([4], [0.0])
        found = check_interval(state, None, names, Guard(), options.exclude, controller.spreading(interval))
        state.data = state.data.consume(4)
        assert len(found) == (expected is not None), found
        assert expected is None or f"mixture.{expected}" in found[0]


def test_a_ratio_that_rises_for_some_intervals_raises_an_alarm() -> None:
    rising = [[2.0 + 0.1 * i, 2.0 - 0.1 * i, 2.0 + 0.1 * (i % 2)] for i in range(5)]
    found = alarms(rising, [1 / 3] * 3)
    assert [len(texts) for texts in found] == [0, 0, 0, 1, 1]
    assert found[3] == ["a falls behind: its ratio has risen for 3 intervals, to 2.3"]
    assert not any(alarms(rising, [1 / 3] * 3, Guard(rising_intervals=0)))
