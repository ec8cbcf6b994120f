"""Numbers gone wrong: steps without a finite gradient, and a loss that leaves its range."""

from __future__ import annotations

import math
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


def is_spike(recent: list[float], loss: float, options: Guard) -> bool:
    """Whether a loss is far above those of the window, once that is full."""
    if len(recent) < _WINDOW or not options.spike_deviations:
        return False
    centre = median(recent)
    deviation = _MAD_TO_SIGMA * median(abs(value - centre) for value in recent)
    return loss - centre > options.spike_deviations * max(deviation, _LEAST_DEVIATION * abs(centre))
