"""Controllers that follow the excess of the student's loss over a reference: Sheared LLaMA and DoReMi."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ddk_ds.mixture.decide import NOTHING_ELSE, Known, controller_state
from ddk_ds.mixture.domain_vectors import Factors, Values, Vector, check_perplexities, check_proportions, mixed, softmax


@dataclass(frozen=True)
class _ExcessLoss:
    """The part that both controllers share: prior, reference losses and the exponential step."""

    names: tuple[str, ...]
    prior: tuple[float, ...] | None
    """(N,) proportions of the first interval; None: equal."""
    reference: tuple[float, ...] | None
    """(N,) reference losses in nats a token; None: the teacher's losses."""
    ppl_smoothing: float
    source: str
    """Where the student's losses come from."""
    name: ClassVar[str]

    @property
    def uses_teacher(self) -> bool:
        """True if the references are the teacher's losses."""
        return self.reference is None

    def spreading(self, interval: int) -> tuple[str, ...]:
        """Return the floors: nothing else bounds what the exponential step takes from a domain."""
        return ("floors",)

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Factors:
        """Return the prior proportions (N,); perplexities are not used."""
        num_domains = len(self.names)
        return Factors.of(np.full(num_domains, 1 / num_domains) if self.prior is None else np.array(self.prior))

    def state_dict(self) -> dict[str, Any]:
        """Return the kind and the options."""
        return controller_state(self)

    def _reweighted(self, logs: Vector, student_ppl: Values, teacher_ppl: Values, step_size: float) -> Factors:
        """Return proportions * exp(step_size * max(loss_S - reference, 0)) divided by their sum, (N,).

        `logs` are those of the proportions. loss_S is the log of the student's perplexity, in nats per token.
        `self.reference` holds the references; if it is None, they are the logs of the teacher's perplexities.
        """
        check_proportions(np.exp(logs), num_domains=len(self.names), label="the interval's proportions")
        losses = np.log(check_perplexities(student_ppl, model="student", names=self.names))
        if self.reference is None:
            references = np.log(check_perplexities(teacher_ppl, model="teacher", names=self.names))
        else:
            references = np.array(self.reference, np.float64)
        return softmax(logs + step_size * np.maximum(losses - references, 0.0))


@dataclass(frozen=True)
class ShearedLlama(_ExcessLoss):
    """Dynamic batch loading of Sheared LLaMA (arXiv 2310.06694, Algorithm 1).

    r_0 = prior; r_{t+1} = r_t exp(max(loss_S - reference, 0)) / sum. Losses are log perplexities, in nats a token.
    Scaling laws predict the paper's references; here they are the teacher's losses or losses from the configuration.
    """

    name: ClassVar[str] = "sheared_llama"

    def update(
        self, logs: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int, known: Known = NOTHING_ELSE
    ) -> Factors:
        """Return the proportions (N,) multiplied by exp(excess loss) and divided by their sum."""
        return self._reweighted(logs, student_ppl, teacher_ppl, 1.0)


@dataclass(frozen=True)
class DoReMiOnline(_ExcessLoss):
    """DoReMi's update of the domain weights (arXiv 2305.10429, Algorithm 1), applied to the student's own mixture.

    r_0 = prior; r' = r_t exp(eta max(loss_S - reference, 0)); r_{t+1} = (1 - c) r' / sum + c / N.

    The paper weights a proxy model's losses by r at every step, clips the excess of each token, and samples by the mean
    of r over the steps. Here r are the sampling proportions of an interval, and the excess is that of the domain's mean
    loss.
    """

    step_size: float
    """eta, the factor of the excess loss."""
    smoothing: float
    """c, 0..1: weight of equal proportions in every update."""
    name: ClassVar[str] = "doremi_online"

    def update(
        self, logs: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int, known: Known = NOTHING_ELSE
    ) -> Factors:
        """Return r_{t+1} (N,) of the formula above; `logs` are those of r_t."""
        sharp = self._reweighted(logs, student_ppl, teacher_ppl, self.step_size)
        return mixed(1 - self.smoothing, sharp, self.smoothing / len(self.names))
