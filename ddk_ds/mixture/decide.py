"""What a controller is: the proportions that it continues from are handed to it, it holds nothing but its options.

One decision between two intervals, as a run takes it and as a replay of its ledger takes it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from ddk_ds.mixture.factors import Values, Vector


class Controller(Protocol):
    """Decides the proportions (N,) of the next interval from perplexities; pure."""

    @property
    def name(self) -> str:
        """The kind, as in the configuration."""

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher's perplexities are needed; else None may be handed in for them."""

    @property
    def ppl_smoothing(self) -> float:
        """Weight of the past in the student's perplexity that is to be handed in (see `decide`); 0: none."""

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """Proportions of interval 0."""

    def update(self, proportions: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int) -> Vector:
        """Proportions of `interval` (from 1), the one after that which had `proportions`."""

    def state_dict(self) -> dict[str, Any]:
        """All that decides what it returns, as plain JSON."""


def options_of(controller: Any) -> dict[str, Any]:
    """The `state_dict` of a controller that is a dataclass: its kind and options."""
    options = {key: _plain(value) for key, value in asdict(controller).items()}
    return {**options, "name": controller.name}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


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
