"""Controllers that draw domains by exp(x / temperature), x the student's loss or its gap to the teacher, in nats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ddk_ds.mixture.decide import NOTHING_ELSE, Known, controller_state
from ddk_ds.mixture.domain_vectors import Factors, Values, Vector, check_divergences, check_perplexities, softmax


@dataclass(frozen=True)
class Boltzmann:
    """r proportional to prior exp(x / T): the proportions with the largest sum of r x - T KL(r, prior).

    With x the loss they are the weights of tilted empirical risk minimization (arXiv 2007.01162) with the tilt 1 / T.
    """

    names: tuple[str, ...]
    prior: tuple[float, ...]
    """(N,) proportions where no domain has a larger x than another."""
    temperature: float
    """T, in nats."""
    measure: str
    """x: "loss" (log l_S), "excess_loss" (log l_S - log l_T), or "kl" (the divergence from the teacher)."""
    ppl_smoothing: float
    source: str
    """Where the student's losses and the divergences come from."""
    name: str
    """The kind: loss_softmax or kl_gap."""

    @property
    def uses_teacher(self) -> bool:
        """True if x is of perplexities of both models."""
        return self.measure == "excess_loss"

    def spreading(self, interval: int) -> tuple[str, ...]:
        """Return the temperature."""
        return ("temperature",)

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Factors:
        """Return the proportions (N,) of the formula above; the prior if training has yet to measure."""
        if self.source == "training":
            return Factors.of(np.array(self.prior))
        return self._tilted(student_ppl, teacher_ppl, None)

    def update(
        self, logs: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int, known: Known = NOTHING_ELSE
    ) -> Factors:
        """Return the proportions (N,) of the formula above; the past ones are not used."""
        return self._tilted(student_ppl, teacher_ppl, known.kl)

    def _tilted(self, student_ppl: Values, teacher_ppl: Values, kl: Values) -> Factors:
        if self.measure == "kl":
            x = check_divergences(kl, names=self.names)
        else:
            x = np.log(check_perplexities(student_ppl, model="student", names=self.names))
        if self.measure == "excess_loss":
            x = x - np.log(check_perplexities(teacher_ppl, model="teacher", names=self.names))
        with np.errstate(divide="ignore"):  # a prior of 0
            return softmax(np.log(self.prior) + x / self.temperature)

    def state_dict(self) -> dict[str, Any]:
        """Return the kind and the options."""
        return controller_state(self)
