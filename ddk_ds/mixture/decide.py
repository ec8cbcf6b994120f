"""A controller and its decision between two intervals, as a run takes it and as a replay of its ledger repeats it.

A controller holds nothing but its options: it is given the logs of the proportions that it continues from, and what it
has asked to be kept from its last decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from ddk_ds.errors import DataError
from ddk_ds.mixture.domain_vectors import Factors, Memory, Values, Vector, perplexity
from ddk_ds.mixture.training_losses import Means, filled


@dataclass(frozen=True)
class Known:
    """The inputs of a decision beside perplexities, at the beginning of an interval."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on so far, of all domains."""
    memory: Memory = None
    """What the controller's last decision kept; None before the first."""
    kl: Values = None
    """(N,) mean divergences from the teacher in nats a token; None if they were not measured."""


NOTHING_ELSE = Known()


class Controller(Protocol):
    """Decides the proportions (N,) of the next interval from perplexities; every method is pure.

    One with a memory returns with the proportions what its next decision needs.
    """

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

    @property
    def source(self) -> str:
        """Source of the student's perplexities and of the divergences: "held_out", or "training"."""

    def spreading(self, interval: int) -> tuple[str, ...]:
        """Return the options of section `mixture` that would spread the proportions of `interval` more evenly.

        Empty for a controller that does not move proportions: they are the user's own.
        """

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Factors:
        """Return the proportions (N,) of interval 0, with their logs."""

    def update(
        self, logs: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int, known: Known = NOTHING_ELSE
    ) -> Factors:
        """Return the proportions (N,) of `interval`, 1 or later; `logs` (N,) are those of the interval before."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the decisions depend on, except perplexities, as plain JSON."""


def controller_state(controller: Any) -> dict[str, Any]:
    """Return the options of a controller that is a dataclass, and its kind under "name", as plain JSON."""
    options = {key: _as_lists(value) for key, value in asdict(controller).items()}
    return {**options, "name": controller.name}


def labelled(memory: dict[str, Any], controller: str, names: Sequence[str]) -> dict[str, Any]:
    """Return a memory with the kind of its controller and the N domains that it is about."""
    return {"controller": controller, "domains": list(names), **memory}


def recalled(memory: Memory, controller: str, names: Sequence[str]) -> dict[str, Any]:
    """Return the memory that this controller kept about these domains.

    Raises:
        DataError: there is none, or it is another controller's or about other domains.
    """
    found = memory or {}
    for key, wanted in (("controller", controller), ("domains", list(names))):
        if found.get(key) != wanted:
            raise DataError(
                f"mixture.controller {controller} continues from what its last decision kept about {', '.join(names)}, "
                f"and that decision kept {key} {found.get(key)}: begin with this controller and these domains at the "
                "run's first interval, or as another phase (init_as: phase)"
            )
    return found


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
    memory: Memory = None
    """What the controller keeps for the next decision."""


def decide(
    controller: Controller,
    last: Decision | None,
    student_ppl: Vector,
    teacher_ppl: Values,
    *,
    interval: int,
    step: int = 0,
    tokens: int = 0,
    training: Means | None = None,
) -> Decision:
    """Return the decision on `interval` (from 0). It is a pure function.

    Args:
        last: the decision on the interval before; None for the first.
        student_ppl, teacher_ppl: (N,) perplexities, measured at the beginning of the interval.
        step, tokens: optimizer steps done before it, and tokens trained on, of all domains.
        training: losses of the training samples since then; None if nobody asked for them.

    Raises:
        DataError: a perplexity that the controller needs is missing or not a positive finite number, or `last` does not
            have what the controller remembers (`recalled`), or the losses of training are missing.
    """
    used, kl, smoothed = student_ppl, None, []
    if controller.source == "training" and last is not None:
        if training is None:
            raise DataError(
                f"mixture.source is training, and nothing was measured in training before interval {interval}: its "
                "run had source: held_out"
            )
        losses, kl = filled(training, np.log(student_ppl))
        used = perplexity(losses)
    if controller.ppl_smoothing:
        used = smoothed_perplexities([] if last is None else last.smoothed_ppl, student_ppl, controller.ppl_smoothing)
        smoothed = used.tolist()
    if last is None:
        factors = controller.start(used, teacher_ppl)
    else:
        logs = np.array([-np.inf if log is None else log for log in last.log_proportions])
        known = Known(step, tokens, last.memory, kl)
        factors = controller.update(logs, used, teacher_ppl, interval=interval, known=known)
    # JSON has no infinity.
    kept_logs = [None if log == -np.inf else log for log in factors.logs.tolist()]
    return Decision(factors.proportions.tolist(), smoothed, kept_logs, factors.memory)


def smoothed_perplexities(last: Sequence[float], measured: Vector, weight: float) -> Vector:
    """Compute the moving average of log perplexities: exp(weight log last + (1 - weight) log measured), (N,).

    `last` is empty at the first measurement, which is returned unchanged.
    """
    if not len(last):
        return measured.copy()
    with np.errstate(divide="ignore", invalid="ignore"):  # the controller refuses values that are no perplexities
        return np.exp(weight * np.log(np.asarray(last, np.float64)) + (1 - weight) * np.log(measured))
