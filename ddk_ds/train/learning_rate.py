"""The learning rate of a step: a pure function of the step, so that there is nothing of it to save or to restore."""

from __future__ import annotations

import math

from ddk_ds.config import Optimizer
from ddk_ds.config.optimizer import decay_begin


def learning_rate(step: int, total_steps: int, options: Optimizer) -> float:
    """Return the rate of step `step` (from 0) of `total_steps`: a linear warm-up, then `optimizer.schedule`."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    begin = decay_begin(options, total_steps)
    progress = min(1.0, max(0.0, (step - begin) / max(1, total_steps - begin)))
    left = _left(options.decay_shape if options.schedule == "wsd" else options.schedule, progress)
    return options.min_learning_rate + (options.learning_rate - options.min_learning_rate) * left


def _left(shape: str, progress: float) -> float:
    """Return the share of the way from peak to minimum that is left after `progress` (0 to 1) of the decay."""
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if shape == "linear":
        return 1.0 - progress
    return 1.0 - math.sqrt(progress) if shape == "1-sqrt" else 1.0
