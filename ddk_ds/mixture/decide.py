"""One decision between two intervals, as a run takes it and as a replay of its ledger takes it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ddk_ds.mixture.factors import Values, Vector
from ddk_ds.mixture.protocol import Controller


@dataclass(frozen=True)
class Decision:
    """What the next decision continues from."""

    proportions: list[float]
    """(N,) of the interval."""
    smoothed_ppl: list[float]
    """(N,) the student's perplexities as the controller was given them; empty where it smooths none."""


def decide(
    controller: Controller, last: Decision | None, student_ppl: Vector, teacher_ppl: Values, *, interval: int
) -> Decision:
    """The decision on `interval` (from 0); pure.

    Args:
        last: the decision on the interval before; None for the first.
        student_ppl, teacher_ppl: (N,) as measured at the interval's beginning.

    Raises:
        DataError: a perplexity that the controller needs is missing or not a positive finite number.
    """
    used, smoothed = student_ppl, []
    if controller.ppl_smoothing:
        used = smoothed_perplexities([] if last is None else last.smoothed_ppl, student_ppl, controller.ppl_smoothing)
        smoothed = used.tolist()
    if last is None:
        proportions = controller.start(used, teacher_ppl)
    else:
        current = np.array(last.proportions, np.float64)
        proportions = controller.update(current, used, teacher_ppl, interval=interval)
    return Decision(proportions.tolist(), smoothed)


def smoothed_perplexities(last: Sequence[float], measured: Vector, weight: float) -> Vector:
    """The exponential moving average of log perplexities: exp(weight log last + (1 - weight) log measured), (N,).

    `last` is empty at the first measurement, which is taken as it is.
    """
    if not len(last):
        return measured.copy()
    with np.errstate(divide="ignore", invalid="ignore"):  # the controller refuses what is no perplexity
        return np.exp(weight * np.log(np.asarray(last, np.float64)) + (1 - weight) * np.log(measured))
