"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from ddk_ds.config import Optimizer


def learning_rate(step: int, total_steps: int, options: Optimizer) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up from 0, then cosine to the floor at `total_steps`."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    decay_steps = max(1, total_steps - options.warmup_steps)
    progress = min(1.0, (step - options.warmup_steps) / decay_steps)
    span = options.learning_rate - options.min_learning_rate
    return options.min_learning_rate + span * 0.5 * (1.0 + math.cos(math.pi * progress))
