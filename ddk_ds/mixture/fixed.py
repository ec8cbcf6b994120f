"""Controllers that look at no perplexity: fixed proportions, and proportions by interval from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ddk_ds.errors import ConfigError
from ddk_ds.mixture.bounds import given_proportions
from ddk_ds.mixture.decide import options_of
from ddk_ds.mixture.factors import Values, Vector

Stage = tuple[int, tuple[float, ...]]  # first interval, proportions (N,)


@dataclass(frozen=True)
class Static:
    """Fixed proportions: equal ("ES" of arXiv 2407.16154, Table 5), by size (its CPT and KD baselines), or given."""

    names: tuple[str, ...]
    proportions: tuple[float, ...]
    name: str = "static"
    uses_teacher: ClassVar[bool] = False
    ppl_smoothing: ClassVar[float] = 0.0

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """The fixed proportions; perplexities are not looked at."""
        return np.array(self.proportions, np.float64)

    def update(self, proportions: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int) -> Vector:
        """The fixed proportions again."""
        return np.array(self.proportions, np.float64)

    def state_dict(self) -> dict[str, Any]:
        """Kind and proportions."""
        return options_of(self)


@dataclass(frozen=True)
class Scheduled:
    """Proportions by interval, from the user's file; each stage holds until the next one begins."""

    names: tuple[str, ...]
    stages: tuple[Stage, ...]
    """In ascending order of their first intervals; the first is 0."""
    name: ClassVar[str] = "schedule"
    uses_teacher: ClassVar[bool] = False
    ppl_smoothing: ClassVar[float] = 0.0

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """The first stage's proportions; perplexities are not looked at."""
        return self._at(0)

    def update(self, proportions: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int) -> Vector:
        """The proportions of the stage that `interval` lies in."""
        return self._at(interval)

    def state_dict(self) -> dict[str, Any]:
        """Kind and stages."""
        return options_of(self)

    def _at(self, interval: int) -> Vector:
        return np.array([shares for first, shares in self.stages if first <= interval][-1], np.float64)


def parse_stages(content: Any, names: Sequence[str], exclude: Sequence[str], *, source: str) -> tuple[Stage, ...]:
    """The stages in a schedule's content: a list of {from_interval: int, proportions: {domain: proportion}}.

    Args:
        content: plain values, as YAML gives them.
        source: the file's name, for messages.

    Raises:
        ConfigError: naming the file, the entry (from 1), and the domain or value that is wrong.
    """
    if not isinstance(content, list) or not content:
        raise ConfigError(
            f"mixture.schedule_file {source}: holds {type(content).__name__}, expected a list of "
            "{from_interval: 0, proportions: {domain: proportion}} with an entry at least"
        )
    stages: list[Stage] = []
    for number, entry in enumerate(content, 1):
        where = f"mixture.schedule_file {source}, entry {number}"
        if not isinstance(entry, Mapping) or set(entry) != {"from_interval", "proportions"}:
            keys = ", ".join(map(str, entry)) if isinstance(entry, Mapping) else repr(entry)
            raise ConfigError(f"{where}: has {keys or 'no keys'}, expected from_interval and proportions")
        stages.append((_first_interval(entry["from_interval"], stages, where), _shares(entry, names, exclude, where)))
    return tuple(stages)


def _first_interval(value: Any, before: Sequence[Stage], where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{where}: from_interval is {value!r}: give a whole number")
    if not before and value != 0:
        raise ConfigError(f"{where}: from_interval is {value}: the first entry begins with interval 0")
    if before and value <= before[-1][0]:
        raise ConfigError(
            f"{where}: from_interval is {value}, that of the entry before {before[-1][0]}: put them in order"
        )
    return value


def _shares(entry: Mapping[str, Any], names: Sequence[str], exclude: Sequence[str], where: str) -> tuple[float, ...]:
    shares = entry["proportions"]
    if not isinstance(shares, Mapping):
        raise ConfigError(f"{where}: proportions are {shares!r}: give one by domain")
    for domain, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise ConfigError(f"{where}: the proportion of '{domain}' is {share!r}: give a number")
    return given_proportions(shares, names, exclude, what=f"{where}: proportions")
