"""The lengths of intervals and run, in optimizer steps, as pure functions of the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ddk_ds.config.run import Config
from ddk_ds.config.sections import Mixture

_MAX_INTERVAL_STEPS = 2**40


def interval_steps(mixture: Mixture, interval: int) -> int:
    """K_t, the optimizer steps of interval t (from 0): max(1, round(interval_steps * interval_growth^t))."""
    try:
        exact = mixture.interval_steps * mixture.interval_growth**interval
    except OverflowError:
        exact = math.inf
    return max(1, round(min(exact, _MAX_INTERVAL_STEPS)))


def corpus_samples(mixture: Mixture, sizes: Mapping[str, int]) -> int:
    """Training samples of the domains that take part; `sizes` by domain."""
    return sum(int(size) for name, size in sizes.items() if name not in mixture.exclude)


def total_steps(config: Config, corpus_samples: int) -> int:
    """Optimizer steps after which the run ends at the latest; the cosine reaches its floor there."""
    ends = []
    if config.stop.steps is not None:
        ends.append(config.stop.steps)
    if config.stop.intervals is not None:
        ends.append(sum(interval_steps(config.mixture, t) for t in range(config.stop.intervals)))
    if config.stop.data_once:
        steps = interval = 0
        while steps * config.train.global_batch_samples < corpus_samples:
            steps += interval_steps(config.mixture, interval)
            interval += 1
        ends.append(steps)
    return min(ends)
