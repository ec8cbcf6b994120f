"""The time to a run's end, as the run's own terminal and `ddk status` estimate it."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence

RECENT_STEPS = 30
"""Newest steps whose mean time stands for that of the steps to come."""


class RemainingTime:
    """Estimate of the time to the run's end: steps, the measurements between them, the last checkpoint, the export.

    A measurement is taken to last as long as the one before it. The last checkpoint and the export are each taken to
    last as long as the newest checkpoint; without one they count nothing.
    """

    def __init__(self, total_steps: int, measured_at: Sequence[int]) -> None:
        """Store the number of steps, and after which of them the student is measured, in ascending order."""
        self._total = total_steps
        self._measured_at = measured_at
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._measured = -1
        self._measure_s: float | None = None
        self._checkpoint_s = 0.0

    def step_took(self, seconds: float) -> None:
        """Note the time of a step."""
        self._steps.append(seconds)

    def measurement_took(self, seconds: float, step: int) -> None:
        """Note the time of a measurement after `step`."""
        self._measure_s, self._measured = seconds, step

    def checkpoint_took(self, seconds: float) -> None:
        """Note the time of a checkpoint, from its beginning to its completion."""
        self._checkpoint_s = seconds

    def seconds(self, step: int, measuring: tuple[float, float] | None = None) -> float | None:
        """Return the time from now, after `step`, to the end; None before anything is known.

        Args:
            measuring: share that is done of the measurement under way, and seconds since it began; None without one.
        """
        left = len(self._measured_at) - bisect_left(self._measured_at, step)
        here = step in self._measured_at[bisect_left(self._measured_at, step) :][:1]
        if here and (measuring is not None or self._measured == step):
            left -= 1  # counted by itself, or done
        measure_s, rest = self._measure_s, 0.0
        if measuring is not None:
            share, elapsed = measuring
            if measure_s is None:
                if not share:
                    return None
                measure_s = elapsed / share
            rest = max(0.0, measure_s * (1 - share))
        steps_left = max(0, self._total - step)
        if steps_left and not self._steps:
            return None
        step_s = sum(self._steps) / max(1, len(self._steps))
        return rest + steps_left * step_s + left * (measure_s or 0.0) + 2 * self._checkpoint_s
