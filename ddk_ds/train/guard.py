"""Numbers gone wrong: steps without a finite gradient, a loss that leaves its range, a mixture that serves nobody."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from ddk_ds.config import Guard
from ddk_ds.train.state import RunState

EXIT_WRONG_NUMBERS = 3
_WINDOW = 64
# Of a normal distribution: standard deviation over median absolute deviation.
_MAD_TO_SIGMA = 1.4826
# A loss that hardly varies would call every ripple a spike: deviations count from this share of the median up.
_LEAST_DEVIATION = 0.01


class NumbersGoneWrong(Exception):
    """The run stops, on all ranks. The message says what was seen."""


def check_step(state: RunState, loss: float, grad_norm: float, options: Guard) -> None:
    """Note a step's numbers in the state, which are the same on every rank.

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
        state.recent_losses = [*state.recent_losses, loss][-_WINDOW:]


def check_interval(
    state: RunState,
    ratio: Sequence[float] | None,
    names: Sequence[str],
    options: Guard,
    excluded: Sequence[str] = (),
) -> list[str]:
    """Alarms at an interval's beginning, of its proportions and of the ratios (N,) to the teacher; notes the ratios."""
    alarms = []
    shares = state.proportions
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    equal = math.log(len(shares) - len(excluded))
    if state.data.interval > 0 and entropy < options.least_entropy * equal:
        top = max(range(len(shares)), key=shares.__getitem__)
        alarms.append(
            f"the mixture is nearly one domain's: {names[top]} has {shares[top]:.1%}, the entropy is "
            f"{entropy / equal:.2f} of equal proportions'; mixture.alpha or mixture.ratio_cap spread it"
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
    """Whether a loss is far above those of the window, once that is full."""
    if len(recent) < _WINDOW or not options.spike_deviations:
        return False
    centre = median(recent)
    deviation = _MAD_TO_SIGMA * median(abs(value - centre) for value in recent)
    return loss - centre > options.spike_deviations * max(deviation, _LEAST_DEVIATION * abs(centre))
