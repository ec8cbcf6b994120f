"""Controllers that follow the excess loss over a reference: Sheared LLaMA's and DoReMi's updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ddk_ds.mixture.decide import options_of
from ddk_ds.mixture.factors import Values, Vector, check_perplexities, check_proportions, reweighted


@dataclass(frozen=True)
class _ExcessLoss:
    """What both have: where they begin, and what a loss is held against."""

    names: tuple[str, ...]
    prior: tuple[float, ...] | None = None
    """(N,) proportions to begin with; None: equal."""
    reference: tuple[float, ...] | None = None
    """(N,) reference losses, nats a token; None: the teacher's."""
    ppl_smoothing: float = 0.0
    name: ClassVar[str]

    @property
    def uses_teacher(self) -> bool:
        """Whether the references are the teacher's losses."""
        return self.reference is None

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """The prior; perplexities are not looked at."""
        num_domains = len(self.names)
        return np.full(num_domains, 1 / num_domains) if self.prior is None else np.array(self.prior, np.float64)

    def state_dict(self) -> dict[str, Any]:
        """Kind and options."""
        return options_of(self)

    def _moved(self, proportions: Vector, student_ppl: Values, teacher_ppl: Values, step_size: float) -> Vector:
        """The proportions times exp(step_size max(loss_S - reference, 0)), divided by their sum, (N,)."""
        current = check_proportions(proportions, num_domains=len(self.names), what="the interval's proportions")
        losses = np.log(check_perplexities(student_ppl, model="student", names=self.names))
        if self.reference is None:
            references = np.log(check_perplexities(teacher_ppl, model="teacher", names=self.names))
        else:
            references = np.array(self.reference, np.float64)
        return reweighted(current, step_size * np.maximum(losses - references, 0.0))


@dataclass(frozen=True)
class ShearedLlama(_ExcessLoss):
    """Dynamic batch loading of Sheared LLaMA (arXiv 2310.06694, Algorithm 1):

    w_0 = prior; w_{t+1} = w_t exp(max(loss_S - reference, 0)) / sum. Losses are log perplexities, in nats a token.
    The paper's references are predicted by scaling laws; here they are the teacher's losses, or given.
    """

    name: ClassVar[str] = "sheared_llama"

    def update(self, proportions: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int) -> Vector:
        """The proportions times exp(excess loss), divided by their sum."""
        return self._moved(proportions, student_ppl, teacher_ppl, 1.0)


@dataclass(frozen=True)
class DoReMiOnline(_ExcessLoss):
    """DoReMi's update of the domain weights (arXiv 2305.10429, Algorithm 1), applied to the student's own mixture:

    alpha_0 = prior; alpha' = alpha_{t-1} exp(eta max(loss_S - reference, 0)); alpha_t = (1 - c) alpha' / sum + c / N.

    The paper weighs a proxy model's losses by alpha at every step, clips the excess of each token, and samples by
    alpha's mean over the steps; here alpha is the sampling proportion of an interval, and the excess is that of the
    domain's mean loss. The paper's prior is the default, equal proportions.
    """

    step_size: float = 1.0
    """eta."""
    smoothing: float = 1e-3
    """c, 0..1: share of equal proportions in every update."""
    name: ClassVar[str] = "doremi_online"

    def update(self, proportions: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int) -> Vector:
        """The proportions times exp(eta excess loss), divided by their sum and smoothed."""
        sharp = self._moved(proportions, student_ppl, teacher_ppl, self.step_size)
        return (1 - self.smoothing) * sharp + self.smoothing / len(self.names)
