"""The paper's controller (DDK, arXiv 2407.16154): Eq. 1 and Eq. 2, and the ablation without smoothing.

The paper calls the proportions r_t domain discrepancy factors. Both equations are computed in the log domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ddk_ds.errors import ConfigError, DataError
from ddk_ds.mixture.decide import NOTHING_ELSE, Known, controller_state
from ddk_ds.mixture.domain_vectors import (
    Factors,
    Values,
    Vector,
    check_perplexities,
    check_proportions,
    domain_label,
    mixed,
    softmax,
)


def perplexity_ratios(
    student_ppl: Values, teacher_ppl: Values, *, cap: float | None, names: Sequence[str] | None = None
) -> Vector:
    """Compute l_S / l_T, the ratio of the student's to the teacher's perplexity, (N,).

    Args:
        student_ppl, teacher_ppl: (N,) perplexities l_S, l_T.
        cap: upper bound on the ratio; None: no bound, as in the paper.
        names: the domains' names, for messages.

    Raises:
        DataError: a perplexity is missing or not a positive finite number, or a ratio overflows.
    """
    student = check_perplexities(student_ppl, model="student", names=names)
    teacher = check_perplexities(teacher_ppl, model="teacher", names=names)
    if len(student) != len(teacher):
        raise DataError(f"{len(student)} perplexities of the student, {len(teacher)} of the teacher")
    with np.errstate(over="ignore"):
        ratios = student / teacher
    if not np.isfinite(ratios).all():
        i = int(np.flatnonzero(~np.isfinite(ratios))[0])
        label = domain_label(names, i)
        raise DataError(f"student {student[i]} / teacher {teacher[i]} perplexity of {label} overflows")
    return ratios if cap is None else np.minimum(ratios, cap)


def discrepancy(student_ppl: Values, teacher_ppl: Values, *, names: Sequence[str] | None = None) -> float:
    """Return the largest l_S / l_T - 1 over the domains: Algorithm 1 can stop when it falls under a threshold."""
    return float(perplexity_ratios(student_ppl, teacher_ppl, cap=None, names=names).max() - 1)


def initial_factors(ratios: Vector, *, floor: float) -> Factors:
    """Compute Eq. 1 of arXiv 2407.16154: r_0 = softmax(l_S / l_T), (N,), sums to 1.

    Args:
        ratios: (N,) l_S / l_T.
        floor: lower bound on every proportion, r = floor + (1 - N floor) softmax; 0 as in the paper.

    Raises:
        ConfigError: floor is not between 0 and 1/N.
    """
    num_domains = len(ratios)
    if not (floor >= 0 and floor * num_domains <= 1 + 1e-12):  # 1/N times N can round up
        raise ConfigError(
            f"mixture.initial_floor is {floor} for {num_domains} domains: give a number between 0 and 1/{num_domains}"
        )
    return mixed(max(0.0, 1 - num_domains * floor), softmax(ratios), floor)


def updated_factors(logs: Vector, ratios: Vector, *, alpha: float, prior: Sequence[float] | None) -> Factors:
    """Compute Eq. 2 of arXiv 2407.16154.

    psi = r_t exp(l_S / l_T); r_{t+1} = alpha psi / sum(psi) + (1 - alpha) / N, (N,), sums to 1.

    Args:
        logs: (N,) log r_t; the proportions sum to 1. -inf is legal (its psi is 0).
        ratios: (N,) l_S / l_T.
        alpha: smoothing coefficient, 0..1; every domain keeps at least (1 - alpha) / N.
        prior: (N,) proportions in place of 1/N; None: 1/N, as in the paper.

    Raises:
        ConfigError: `logs` or `prior` are not those of proportions of N domains.
    """
    check_proportions(np.exp(logs), num_domains=len(ratios), label="the interval's proportions r_t")
    psi = softmax(logs + (ratios - ratios.max()))
    if prior is None:
        return mixed(alpha, psi, (1 - alpha) / len(ratios))
    return mixed(alpha, psi, (1 - alpha) * check_proportions(prior, num_domains=len(ratios), label="mixture.prior"))


@dataclass(frozen=True)
class DDK:
    """DDK as published: Eq. 1 for the first interval, Eq. 2 for every later one."""

    names: tuple[str, ...]
    alpha: float
    ratio_cap: float | None
    initial_floor: float
    initial: str
    """Rule of the first interval: "eq1", or "equal" for proportions of 1/N."""
    prior: tuple[float, ...] | None
    """(N,) proportions in place of Eq. 2's 1/N; None: 1/N, as in the paper."""
    ppl_smoothing: float
    name: ClassVar[str] = "ddk"
    uses_teacher: ClassVar[bool] = True
    source: ClassVar[str] = "held_out"

    def spreading(self, interval: int) -> tuple[str, ...]:
        """Return the options of Eq. 1 for the first interval, and those of Eq. 2 for every later one."""
        return ("ratio_cap", "alpha") if interval else ("ratio_cap", "initial_floor")

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Factors:
        """Return the first factors (N,): Eq. 1 with its cap and floor, or 1/N each if `initial` is "equal"."""
        if self.initial == "equal":
            return Factors.of(np.full(len(self.names), 1 / len(self.names)))
        ratios = perplexity_ratios(student_ppl, teacher_ppl, cap=self.ratio_cap, names=self.names)
        return initial_factors(ratios, floor=self.initial_floor)

    def update(
        self, logs: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int, known: Known = NOTHING_ELSE
    ) -> Factors:
        """Return the next factors (N,), computed by Eq. 2 with the configured cap and prior."""
        ratios = perplexity_ratios(student_ppl, teacher_ppl, cap=self.ratio_cap, names=self.names)
        return updated_factors(logs, ratios, alpha=self.alpha, prior=self.prior)

    def state_dict(self) -> dict[str, Any]:
        """Return the kind and the options."""
        return controller_state(self)


@dataclass(frozen=True)
class DDKNoSmoothing:
    """The ablation "w/o FS" (arXiv 2407.16154, Table 5): Eq. 1 at every interval, with its cap and floor."""

    names: tuple[str, ...]
    ratio_cap: float | None
    initial_floor: float
    ppl_smoothing: float
    name: ClassVar[str] = "ddk_no_smoothing"
    uses_teacher: ClassVar[bool] = True
    source: ClassVar[str] = "held_out"

    def spreading(self, interval: int) -> tuple[str, ...]:
        """Return the options of Eq. 1, which every interval uses."""
        return ("ratio_cap", "initial_floor")

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Factors:
        """Return the first factors (N,), computed by Eq. 1 with the configured cap and floor."""
        ratios = perplexity_ratios(student_ppl, teacher_ppl, cap=self.ratio_cap, names=self.names)
        return initial_factors(ratios, floor=self.initial_floor)

    def update(
        self, logs: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int, known: Known = NOTHING_ELSE
    ) -> Factors:
        """Return the next factors (N,), computed by Eq. 1 again; the past ones are not used."""
        return self.start(student_ppl, teacher_ppl)

    def state_dict(self) -> dict[str, Any]:
        """Return the kind and the options."""
        return controller_state(self)
