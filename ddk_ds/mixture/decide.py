"""A controller and its decision between two intervals, as a run takes it and as a replay of its ledger repeats it.

A controller holds nothing but its options: it is given the logs of the proportions that it continues from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from ddk_ds.mixture.domain_vectors import Factors, Values, Vector


class Controller(Protocol):
    """Decides the proportions (N,) of the next interval from perplexities; every method is pure."""

    @property
    def name(self) -> str:
        """Kind of the controller, as `mixture.controller` of the configuration names it."""

    @property
    def uses_teacher(self) -> bool:
        """True if the controller needs the teacher's perplexities; otherwise they can be None."""

    @property
    def ppl_smoothing(self) -> float:
        """Weight, 0 <= weight < 1, of the past in the moving average of the student's log perplexities.

        `decide` passes the averaged perplexities to the controller; with 0 it passes the measured ones.
        """

    def spreading(self, interval: int) -> tuple[str, ...]:
        """Return the options of section `mixture` that would spread the proportions of `interval` more evenly.

        Empty for a controller that does not move proportions: they are the user's own.
        """

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Factors:
        """Return the proportions (N,) of interval 0, with their logs."""

    def update(self, logs: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int) -> Factors:
        """Return the proportions (N,) of `interval`, 1 or later; `logs` (N,) are those of the interval before."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the decisions depend on, except perplexities, as plain JSON."""


def controller_state(controller: Any) -> dict[str, Any]:
    """Return the options of a controller that is a dataclass, and its kind under "name", as plain JSON."""
    options = {key: _as_lists(value) for key, value in asdict(controller).items()}
    return {**options, "name": controller.name}


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Decision:
    """The decision on one interval, which the next decision continues from."""

    proportions: list[float]
    """(N,) proportions of the interval."""
    smoothed_ppl: list[float]
    """(N,) the student's perplexities as the controller received them; empty if it smooths none."""
    log_proportions: list[float | None]
    """(N,) natural logs of the proportions, also of one that is too small for a float; None where it is 0."""


def decide(
    controller: Controller, last: Decision | None, student_ppl: Vector, teacher_ppl: Values, *, interval: int
) -> Decision:
    """Return the decision on `interval` (from 0). It is a pure function.

    Args:
        last: the decision on the interval before; None for the first.
        student_ppl, teacher_ppl: (N,) perplexities, measured at the beginning of the interval.

    Raises:
        DataError: a perplexity that the controller needs is missing or not a positive finite number.
    """
    used, smoothed = student_ppl, []
    if controller.ppl_smoothing:
        used = smoothed_perplexities([] if last is None else last.smoothed_ppl, student_ppl, controller.ppl_smoothing)
        smoothed = used.tolist()
    if last is None:
        factors = controller.start(used, teacher_ppl)
    else:
        logs = np.array([-np.inf if log is None else log for log in last.log_proportions])
        factors = controller.update(logs, used, teacher_ppl, interval=interval)
    # JSON has no infinity.
    return Decision(
        factors.proportions.tolist(), smoothed, [None if log == -np.inf else log for log in factors.logs.tolist()]
    )


def smoothed_perplexities(last: Sequence[float], measured: Vector, weight: float) -> Vector:
    """Compute the moving average of log perplexities: exp(weight log last + (1 - weight) log measured), (N,).

    `last` is empty at the first measurement, which is returned unchanged.
    """
    if not len(last):
        return measured.copy()
    with np.errstate(divide="ignore", invalid="ignore"):  # the controller refuses values that are no perplexities
        return np.exp(weight * np.log(np.asarray(last, np.float64)) + (1 - weight) * np.log(measured))
