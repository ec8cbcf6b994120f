"""Controllers that follow the excess loss over a reference: Sheared LLaMA's and DoReMi's updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ddk_ds.mixture.factors import Values, Vector, check_perplexities, check_proportions, reweighted
from ddk_ds.mixture.protocol import options_of


@dataclass(frozen=True)
class ShearedLlama:
    """Dynamic batch loading of Sheared LLaMA (arXiv 2310.06694, Algorithm 1):

    w_0 = prior; w_{t+1} = w_t exp(max(loss_S - reference, 0)) / sum. Losses are log perplexities, in nats a token.
    The paper's references are predicted by scaling laws; here they are the teacher's losses, or given.
    """

    names: tuple[str, ...]
    prior: tuple[float, ...] | None = None
    """(N,) proportions to begin with; None: equal."""
    reference: tuple[float, ...] | None = None
    """(N,) reference losses, nats a token; None: the teacher's."""
    ppl_smoothing: float = 0.0
    name: ClassVar[str] = "sheared_llama"

    @property
    def uses_teacher(self) -> bool:
        """Whether the references are the teacher's losses."""
        return self.reference is None

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """The prior; perplexities are not looked at."""
        return _prior(self)

    def update(self, proportions: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int) -> Vector:
        """The proportions times exp(excess loss), divided by their sum."""
        return reweighted(_current(self, proportions), _excess(self, student_ppl, teacher_ppl))

    def state_dict(self) -> dict[str, Any]:
        """Kind and options."""
        return options_of(self)


@dataclass(frozen=True)
class DoReMiOnline:
    """DoReMi's update of the domain weights (arXiv 2305.10429, Algorithm 1), applied to the student's own mixture:

    alpha_0 = prior; alpha' = alpha_{t-1} exp(eta max(loss_S - reference, 0)); alpha_t = (1 - c) alpha' / sum + c / N.

    The paper weighs a proxy model's losses by alpha at every step, clips the excess of each token, and samples by
    alpha's mean over the steps; here alpha is the sampling proportion of an interval, and the excess is that of the
    domain's mean loss.
    """

    names: tuple[str, ...]
    prior: tuple[float, ...] | None = None
    """(N,) proportions to begin with; None: equal, the paper's."""
    reference: tuple[float, ...] | None = None
    """(N,) reference losses, nats a token; None: the teacher's."""
    step_size: float = 1.0
    """eta."""
    smoothing: float = 1e-3
    """c, 0..1: share of equal proportions in every update."""
    ppl_smoothing: float = 0.0
    name: ClassVar[str] = "doremi_online"

    @property
    def uses_teacher(self) -> bool:
        """Whether the references are the teacher's losses."""
        return self.reference is None

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """The prior; perplexities are not looked at."""
        return _prior(self)

    def update(self, proportions: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int) -> Vector:
        """The proportions times exp(eta excess loss), divided by their sum and smoothed."""
        excess = _excess(self, student_ppl, teacher_ppl)
        sharp = reweighted(_current(self, proportions), self.step_size * excess)
        return (1 - self.smoothing) * sharp + self.smoothing / len(self.names)

    def state_dict(self) -> dict[str, Any]:
        """Kind and options."""
        return options_of(self)


def _prior(options: ShearedLlama | DoReMiOnline) -> Vector:
    num_domains = len(options.names)
    return np.full(num_domains, 1 / num_domains) if options.prior is None else np.array(options.prior, np.float64)


def _current(options: ShearedLlama | DoReMiOnline, proportions: Vector) -> Vector:
    return check_proportions(proportions, num_domains=len(options.names), what="the interval's proportions")


def _excess(options: ShearedLlama | DoReMiOnline, student_ppl: Values, teacher_ppl: Values) -> Vector:
    """max(loss_S - reference, 0), (N,), nats a token."""
    losses = np.log(check_perplexities(student_ppl, model="student", names=options.names))
    if options.reference is None:
        references = np.log(check_perplexities(teacher_ppl, model="teacher", names=options.names))
    else:
        references = np.array(options.reference, np.float64)
    return np.maximum(losses - references, 0.0)
