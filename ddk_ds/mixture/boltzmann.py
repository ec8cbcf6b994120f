"""Controllers that draw domains by exp(x / temperature), x the student's loss or its gap to the teacher, in nats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ddk_ds.mixture.decide import NOTHING_ELSE, Known, controller_state
from ddk_ds.mixture.domain_vectors import Factors, Values, Vector, check_perplexities, softmax


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
    ppl_smoothing: float
    name: str
    """The kind: loss_softmax (x is log l_S, the loss) or kl_gap (x is log l_S - log l_T)."""

    @property
    def uses_teacher(self) -> bool:
        """True if x is a gap to the teacher."""
        return self.name == "kl_gap"

    def spreading(self, interval: int) -> tuple[str, ...]:
        """Return the temperature."""
        return ("temperature",)

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Factors:
        """Return the proportions (N,) of the formula above."""
        x = np.log(check_perplexities(student_ppl, model="student", names=self.names))
        if self.uses_teacher:
            x = x - np.log(check_perplexities(teacher_ppl, model="teacher", names=self.names))
        with np.errstate(divide="ignore"):  # a prior of 0
            return softmax(np.log(self.prior) + x / self.temperature)

    def update(
        self, logs: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int, known: Known = NOTHING_ELSE
    ) -> Factors:
        """Return the proportions (N,) of the formula above; the past ones are not used."""
        return self.start(student_ppl, teacher_ppl)

    def state_dict(self) -> dict[str, Any]:
        """Return the kind and the options."""
        return controller_state(self)
