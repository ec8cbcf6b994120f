"""Bounds on any controller's proportions: domains that are never drawn, and least proportions of the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ddk_ds.errors import ConfigError
from ddk_ds.mixture.decide import NOTHING_ELSE, Controller, Known
from ddk_ds.mixture.domain_vectors import Factors, Values, Vector, check_domains, softmax, values_in_order


def included_domains(names: Sequence[str], exclude: Sequence[str]) -> tuple[str, ...]:
    """Return the domains of `names` that are drawn, (M,).

    Raises:
        ConfigError: `exclude` names a domain that the run does not have, or every domain.
    """
    check_domains(exclude, names, label="mixture.exclude")
    included = tuple(name for name in names if name not in exclude)
    if not included:
        raise ConfigError(f"mixture.exclude names every domain of this run ({', '.join(names)}): leave at least one")
    return included


def floors_in_order(floors: Mapping[str, float], names: Sequence[str], exclude: Sequence[str]) -> tuple[float, ...]:
    """Return the least proportions (M,) in the order of `names`, the domains that are drawn; empty if none is given.

    Raises:
        ConfigError: a domain is unknown or excluded, or the sum is above 1.
    """
    if not floors:
        return ()
    for name in exclude:
        if name in floors:
            raise ConfigError(f"mixture.floors: '{name}' is in mixture.exclude too: remove it from one of the two")
    ordered = values_in_order(floors, names, label="mixture.floors", quantity="floor", default=0.0)
    if (total := math.fsum(ordered)) > 1 + 1e-12:
        raise ConfigError(f"mixture.floors are {dict(floors)} (sum {total:g}): give numbers whose sum is at most 1")
    return tuple(ordered)


@dataclass(frozen=True)
class Bounded:
    """A controller over N domains that decides between M of them.

    The other domains have proportion 0, and each of the M has at least its floor.
    """

    names: tuple[str, ...]
    """Names of all N domains."""
    rule: Controller
    """The controller of the M domains that are drawn."""
    exclude: tuple[str, ...]
    floors: tuple[float, ...]
    """(M,) least proportions; empty: no floors."""

    @property
    def name(self) -> str:
        """Kind of `rule`, the controller inside the bounds."""
        return self.rule.name

    @property
    def uses_teacher(self) -> bool:
        """True if `rule` needs the teacher's perplexities."""
        return self.rule.uses_teacher

    @property
    def source(self) -> str:
        """Source of the measurements that `rule` uses."""
        return self.rule.source

    @property
    def ppl_smoothing(self) -> float:
        """Weight of the past in the student's perplexities that `rule` has."""
        return self.rule.ppl_smoothing

    def spreading(self, interval: int) -> tuple[str, ...]:
        """Return the options of `rule` that spread its proportions."""
        return self.rule.spreading(interval)

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Factors:
        """Return the first proportions (N,) of `rule`, brought within the bounds."""
        return self._bounded(self.rule.start(self._included(student_ppl), self._included(teacher_ppl)))

    def update(
        self, logs: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int, known: Known = NOTHING_ELSE
    ) -> Factors:
        """Return the next proportions (N,) of `rule`, brought within the bounds."""
        current = logs[self._indices]
        # A fork of a run that drew from the excluded domains: the others divide their proportions.
        if np.isfinite(logs).sum() > np.isfinite(current).sum():
            current = softmax(current if np.isfinite(current).any() else np.zeros(len(current))).logs
        students, teachers = self._included(student_ppl), self._included(teacher_ppl)
        known = replace(known, kl=self._included(known.kl))
        return self._bounded(self.rule.update(current, students, teachers, interval=interval, known=known))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of `rule` together with the bounds and the names of all domains."""
        bounds = {"names": list(self.names), "exclude": list(self.exclude), "floors": list(self.floors)}
        return {**self.rule.state_dict(), **bounds}

    @property
    def _indices(self) -> list[int]:
        return [i for i, name in enumerate(self.names) if name not in self.exclude]

    def _included(self, values: Values) -> Values:
        return None if values is None else [values[i] for i in self._indices]

    def _bounded(self, factors: Factors) -> Factors:
        raised = raise_to_floors(self.floors, factors) if self.floors else factors
        bounded, logs = np.zeros(len(self.names)), np.full(len(self.names), -np.inf)
        bounded[self._indices], logs[self._indices] = raised.proportions, raised.logs
        return Factors(bounded, logs, factors.memory)


def raise_to_floors(floors: Sequence[float], factors: Factors) -> Factors:
    """Return proportions (M,) with the sum 1 that are not below their floors.

    Proportions below their floors are set to them, and one common factor < 1 scales the others; this repeats until
    none is below its floor. If none is below its floor at first, all come back unchanged.

    Args:
        floors: (M,) numbers >= 0 whose sum is at most 1.
        factors: (M,) numbers >= 0 with the sum 1.
    """
    least, proportions = np.asarray(floors, np.float64), factors.proportions
    raised, logs = proportions.copy(), factors.logs.copy()
    at_floor = np.zeros(len(least), bool)
    while (under := ~at_floor & (raised < least)).any():
        at_floor |= under
        rest = proportions[~at_floor].sum()
        scale = max(0.0, 1 - least[at_floor].sum()) / rest if rest else 0.0
        raised[at_floor] = least[at_floor]
        raised[~at_floor] = proportions[~at_floor] * scale
        logs[~at_floor] = factors.logs[~at_floor] + (math.log(scale) if scale else -np.inf)
    return Factors.of(raised, logs)
