"""Values by domain, as a configuration gives them, in the order of a run's domains.

Bounds on any controller's proportions: domains that are never drawn, and least proportions.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddk_ds.errors import ConfigError
from ddk_ds.mixture.decide import Controller
from ddk_ds.mixture.factors import Values, Vector, check_proportions


def taking_part(names: Sequence[str], exclude: Sequence[str], *, what: str = "mixture.exclude") -> tuple[str, ...]:
    """The domains of `names` that are drawn at all.

    Raises:
        ConfigError: `exclude` names a domain that the run has not, or leaves none.
    """
    for name in exclude:
        if name not in names:
            raise ConfigError(f"{what}: '{name}' is not a domain of this run: {_hint(str(name), names)}")
    left = tuple(name for name in names if name not in exclude)
    if not left:
        raise ConfigError(f"{what} names every domain of this run ({', '.join(names)}): leave one at least")
    return left


def in_order(
    values: Mapping[str, float], names: Sequence[str], *, what: str, thing: str, default: float | None = None
) -> list[float]:
    """The value of each domain, (N,) in the order of `names`.

    Args:
        what, thing: the key, and what one value of it is called, for messages.
        default: value of a domain that is not named; None: each must be.

    Raises:
        ConfigError: a domain that is not one of `names`, or one of them without a value.
    """
    for name in values:
        if name not in names:
            raise ConfigError(f"{what}: '{name}' is not a domain of this run: {_hint(str(name), names)}")
    for name in names:
        if name not in values and default is None:
            raise ConfigError(f"{what}: '{name}' has no {thing}; name each of {list(names)} once")
    return [float(values.get(name, default or 0.0)) for name in names]


def given_proportions(
    values: Mapping[str, float], names: Sequence[str], exclude: Sequence[str], *, what: str
) -> tuple[float, ...]:
    """Proportions (M,) of the domains that take part, from those of a configuration or file; they sum to 1.

    Raises:
        ConfigError: as `in_order`; numbers that are no proportions; a share of an excluded domain.
    """
    values = {**dict.fromkeys(exclude, 0.0), **values}
    proportions = in_order(values, names, what=what, thing="proportion")
    for name in exclude:
        if values[name] != 0:
            raise ConfigError(
                f"{what}: '{name}' has {values[name]}, and mixture.exclude names it: give it 0, or leave it out of one"
            )
    left = [share for name, share in zip(names, proportions, strict=True) if name not in exclude]
    return tuple(check_proportions(left, num_domains=len(left), what=what).tolist())


def proportions_by_size(names: Sequence[str], sizes: Mapping[str, int]) -> tuple[float, ...]:
    """Proportions (M,) of `names` by their sizes (tokens, say).

    Raises:
        ConfigError: a size that is not > 0.
    """
    for name in names:
        if not sizes[name] > 0:
            raise ConfigError(f"domain '{name}' has size {sizes[name]}: sampling by size needs sizes > 0")
    total = sum(int(sizes[name]) for name in names)
    return tuple(int(sizes[name]) / total for name in names)


def _hint(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{near[0]}'?" if near else f"this run's domains are {', '.join(names)}"


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
