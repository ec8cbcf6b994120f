"""The paper's controller and its ablation without smoothing (arXiv 2407.16154)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ddk_ds.mixture.decide import options_of
from ddk_ds.mixture.factors import Values, Vector, initial_factors, smooth_update


@dataclass(frozen=True)
class DDK:
    """Eq. 1 at the start, Eq. 2 from then on (arXiv 2407.16154):

    r_0 = softmax(l_S / l_T); r_{t+1} = alpha psi / sum(psi) + (1 - alpha) / N, psi = r_t exp(l_S / l_T).
    """

    names: tuple[str, ...]
    alpha: float = 0.5
    ratio_cap: float | None = None
    initial_floor: float = 0.0
    initial: str = "eq1"
    """eq1, or equal: the first interval's proportions are 1/N."""
    prior: tuple[float, ...] | None = None
    """(N,) proportions in place of Eq. 2's 1/N; None is the paper."""
    ppl_smoothing: float = 0.0
    name: ClassVar[str] = "ddk"
    uses_teacher: ClassVar[bool] = True

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """Eq. 1, under the options' cap and floor; or equal proportions."""
        if self.initial == "equal":
            return np.full(len(self.names), 1 / len(self.names))
        return _eq1(self, student_ppl, teacher_ppl)

    def update(self, proportions: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int) -> Vector:
        """Eq. 2, under the options' cap."""
        return smooth_update(
            proportions,
            student_ppl,
            teacher_ppl,
            alpha=self.alpha,
            ratio_cap=self.ratio_cap,
            prior=self.prior,
            names=self.names,
        )

    def state_dict(self) -> dict[str, Any]:
        """Kind and options."""
        return options_of(self)


@dataclass(frozen=True)
class DDKNoSmoothing:
    """The ablation "w/o FS" (arXiv 2407.16154, Table 5): Eq. 1 afresh at every interval, cap and floor included."""

    names: tuple[str, ...]
    ratio_cap: float | None = None
    initial_floor: float = 0.0
    ppl_smoothing: float = 0.0
    name: ClassVar[str] = "ddk_no_smoothing"
    uses_teacher: ClassVar[bool] = True

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """Eq. 1, under the options' cap and floor."""
        return _eq1(self, student_ppl, teacher_ppl)

    def update(self, proportions: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int) -> Vector:
        """Eq. 1 again; the past proportions take no part."""
        return _eq1(self, student_ppl, teacher_ppl)

    def state_dict(self) -> dict[str, Any]:
        """Kind and options."""
        return options_of(self)


def _eq1(options: DDK | DDKNoSmoothing, student_ppl: Values, teacher_ppl: Values) -> Vector:
    return initial_factors(
        student_ppl,
        teacher_ppl,
        ratio_cap=options.ratio_cap,
        floor=options.initial_floor,
        names=options.names,
    )
