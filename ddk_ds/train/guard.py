"""Detection of numbers that went wrong: gradients that are not finite, spikes of the loss, one-sided mixtures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from ddk_ds.config import Guard
from ddk_ds.train.state import RunState

_WINDOW = 64
# Standard deviation divided by median absolute deviation, for a normal distribution.
_MAD_TO_SIGMA = 1.4826
# Least deviation, as a share of the median: without it every ripple of a loss that hardly varies would be a spike.
_LEAST_DEVIATION = 0.01


class NumbersGoneWrong(Exception):
    """The run cannot continue from its current numbers; raised on every rank. The message describes them."""


def check_step(state: RunState, loss: float, grad_norm: float, options: Guard) -> None:
    """Note the loss and gradient norm of a step, which are the same on every rank, in the state.

    A step whose gradient is not finite was skipped: the weights are those before it. A spike is a loss more than
    `spike_deviations` robust standard deviations above the median of the last 64 good steps.

    Raises:
        NumbersGoneWrong: too many such steps in a row.
    """
    if not math.isfinite(loss + grad_norm):
        state.skipped_in_row += 1
        if state.skipped_in_row > options.max_skipped_steps:
            raise NumbersGoneWrong(f"loss or gradient were not finite in {state.skipped_in_row} steps in a row")
        return
    state.skipped_in_row = 0
    state.spikes_in_row = state.spikes_in_row + 1 if is_spike(state.recent_losses, loss, options) else 0
    if state.spikes_in_row >= options.spike_steps:
        usual = median(state.recent_losses)
        raise NumbersGoneWrong(f"the loss rose to {loss:.4g} from {usual:.4g}, {state.spikes_in_row} steps in a row")
    if not state.spikes_in_row:
        state.good_step = state.step
        state.recent_losses = [*state.recent_losses, loss][-_WINDOW:]


def check_interval(
    state: RunState,
    ratio: Sequence[float] | None,
    names: Sequence[str],
    options: Guard,
    excluded: Sequence[str] = (),
    spreading: Sequence[str] = (),
) -> list[str]:
    """Return the alarms at the beginning of an interval, and note its ratios to the teacher in the state.

    There is an alarm if a controller has moved the proportions to little entropy, which names the domains above an
    equal share, or if the ratio of a domain keeps rising.

    Args:
        ratio: (N,) ratios to the teacher; None in a run without one.
        excluded: domains that are never drawn.
        spreading: options of section `mixture` that would spread the proportions; empty if no controller moves them.
    """
    alarms = []
    proportions = state.proportions
    entropy = -sum(share * math.log(share) for share in proportions if share > 0)
    drawn = len(proportions) - len(excluded)
    equal = math.log(drawn)
    if spreading and entropy < options.least_entropy * equal:
        large = sorted(((share, name) for name, share in zip(names, proportions, strict=True) if share * drawn > 1))
        alarms.append(
            f"the mixture is one-sided: {', '.join(f'{name} has {share:.1%}' for share, name in reversed(large))} of "
            f"interval {state.data.interval}, the entropy is {entropy / equal:.2f} of equal proportions'; "
            f"{' and '.join(f'mixture.{option}' for option in spreading)} spread it (docs/methods.md)"
        )
    if ratio is not None:
        before, rises = state.last_ratio or ratio, state.rises or [0] * len(ratio)
        state.rises = [count + 1 if now > was else 0 for now, was, count in zip(ratio, before, rises, strict=True)]
        state.last_ratio = list(ratio)
        for name, count, value in zip(names, state.rises, ratio, strict=True):
            if options.rising_intervals and count >= options.rising_intervals:
                alarms.append(f"{name} falls behind: its ratio has risen for {count} intervals, to {value:.4g}")
    return alarms


def is_spike(recent: list[float], loss: float, options: Guard) -> bool:
    """Return True if `loss` is far above the recent losses; always False until these fill the window."""
    if len(recent) < _WINDOW or not options.spike_deviations:
        return False
    centre = median(recent)
    deviation = _MAD_TO_SIGMA * median(abs(value - centre) for value in recent)
    return loss - centre > options.spike_deviations * max(deviation, _LEAST_DEVIATION * abs(centre))
