"""Online Data Mixing (ODM, arXiv 2312.02406, Algorithm 1): the bandit EXP3 with a domain's loss as its reward."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ddk_ds.mixture.decide import NOTHING_ELSE, Known, controller_state, labelled, recalled
from ddk_ds.mixture.domain_vectors import Factors, Values, Vector, check_perplexities, mixed, softmax


def exploration_rate(num_domains: int, step: int) -> float:
    """Return eps_t = min(1/N, sqrt(ln N / (N t))), the least proportion of each of N domains after `step` steps t."""
    return min(1 / num_domains, math.sqrt(math.log(num_domains) / (num_domains * step)) if step else 1.0)


@dataclass(frozen=True)
class ODM:
    """ODM's proportions; an interval of n steps counts as n of the paper's, all with the loss that was measured.

    At each step R = a R + (1 - a) loss / pi, with pi by which the interval was drawn; then
    pi = (1 - N eps_t) softmax(eps R) + eps_t, where eps is that of the decision before. R_0 = 0, pi_0 = prior.
    """

    names: tuple[str, ...]
    prior: tuple[float, ...]
    """(N,) proportions of the first interval."""
    reward_smoothing: float
    """a, for a step."""
    source: str
    """Where the losses come from."""
    name: ClassVar[str] = "odm"
    uses_teacher: ClassVar[bool] = False
    ppl_smoothing: ClassVar[float] = 0.0

    def spreading(self, interval: int) -> tuple[str, ...]:
        """Return the floors: the least proportion eps_t falls by itself."""
        return ("floors",)

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Factors:
        """Return the prior proportions (N,); perplexities are not used."""
        count = len(self.names)
        memory = {"step": 0, "exploration": exploration_rate(count, 0), "rewards": [0.0] * count}
        return replace(Factors.of(np.array(self.prior)), memory=labelled(memory, self.name, self.names))

    def update(
        self, logs: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int, known: Known = NOTHING_ELSE
    ) -> Factors:
        """Return pi (N,) after the rewards of one more interval; a domain that was not drawn keeps its reward."""
        memory, count = recalled(known.memory, self.name, self.names), len(self.names)
        losses = np.log(check_perplexities(student_ppl, model="student", names=self.names))
        policy, rewards = np.exp(logs), np.array(memory["rewards"])
        old = self.reward_smoothing ** (known.step - memory["step"])
        drawn = policy > 0
        rewards[drawn] = old * rewards[drawn] + (1 - old) * losses[drawn] / policy[drawn]
        rate = exploration_rate(count, known.step)
        factors = mixed(max(0.0, 1 - count * rate), softmax(memory["exploration"] * rewards), rate)
        return replace(factors, memory={**memory, "step": known.step, "exploration": rate, "rewards": rewards.tolist()})

    def state_dict(self) -> dict[str, Any]:
        """Return the kind and the options."""
        return controller_state(self)
