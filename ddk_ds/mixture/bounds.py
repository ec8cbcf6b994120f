"""Bounds on any controller's proportions: domains that are never drawn, and least proportions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddk_ds.mixture.factors import Values, Vector
from ddk_ds.mixture.protocol import Controller


@dataclass(frozen=True)
class Bounded:
    """A controller of M domains among N: the others have proportion 0, and of the M each has at least its floor."""

    names: tuple[str, ...]
    """All N domains."""
    rule: Controller
    """Decides between the M domains that take part; its N is M."""
    exclude: tuple[str, ...] = ()
    floors: tuple[float, ...] = ()
    """(M,) least proportions; empty: none."""

    @property
    def name(self) -> str:
        """The rule's kind."""
        return self.rule.name

    @property
    def uses_teacher(self) -> bool:
        """Whether the rule needs the teacher's perplexities."""
        return self.rule.uses_teacher

    @property
    def ppl_smoothing(self) -> float:
        """The rule's."""
        return self.rule.ppl_smoothing

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """The rule's start within the bounds, (N,)."""
        return self._bounded(self.rule.start(self._part(student_ppl), self._part(teacher_ppl)))

    def update(self, proportions: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int) -> Vector:
        """The rule's update within the bounds, (N,)."""
        current = np.asarray(proportions, np.float64)[self._indices]
        if np.count_nonzero(proportions) > np.count_nonzero(current):  # a fork of a run that drew from them
            current = current / current.sum() if current.any() else np.full(len(current), 1 / len(current))
        students, teachers = self._part(student_ppl), self._part(teacher_ppl)
        return self._bounded(self.rule.update(current, students, teachers, interval=interval))

    def state_dict(self) -> dict[str, Any]:
        """The rule's, with the bounds and the names of all domains."""
        bounds = {"names": list(self.names), "exclude": list(self.exclude), "floors": list(self.floors)}
        return {**self.rule.state_dict(), **bounds}

    @property
    def _indices(self) -> list[int]:
        return [i for i, name in enumerate(self.names) if name not in self.exclude]

    def _part(self, values: Values) -> Values:
        return None if values is None else [values[i] for i in self._indices]

    def _bounded(self, proportions: Vector) -> Vector:
        whole = np.zeros(len(self.names))
        whole[self._indices] = raised_to(self.floors, proportions) if self.floors else proportions
        return whole


def raised_to(floors: Sequence[float], proportions: Vector) -> Vector:
    """Proportions (N,) of which none is under its floor: those under it are raised to it, the others shrink by one
    factor; where none is under it, they are unchanged.

    Args:
        floors: (N,) >= 0 with a sum <= 1.
    """
    least = np.asarray(floors, np.float64)
    found = proportions.copy()
    low = np.zeros(len(least), bool)
    while (under := ~low & (found < least)).any():
        low |= under
        rest = proportions[~low].sum()
        found[low] = least[low]
        found[~low] = proportions[~low] * (max(0.0, 1 - least[low].sum()) / rest if rest else 0.0)
    return found
