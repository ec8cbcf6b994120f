"""Controllers that use no perplexities: fixed proportions, and proportions by interval from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ddk_ds.errors import ConfigError
from ddk_ds.mixture.decide import NOTHING_ELSE, Known, controller_state
from ddk_ds.mixture.domain_vectors import Factors, Values, Vector, proportions_in_order

Stage = tuple[int, tuple[float, ...]]
"""First interval, and proportions (N,) from that interval on."""


@dataclass(frozen=True)
class Static:
    """Fixed proportions: equal ("ES" of arXiv 2407.16154, Table 5), by size (its CPT and KD baselines), or from the
    configuration."""

    names: tuple[str, ...]
    proportions: tuple[float, ...]
    name: str
    """The kind: static, equal or by_size."""
    uses_teacher: ClassVar[bool] = False
    source: ClassVar[str] = "held_out"
    ppl_smoothing: ClassVar[float] = 0.0

    def spreading(self, interval: int) -> tuple[str, ...]:
        """Return nothing: the proportions are the user's own."""
        return ()

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Factors:
        """Return the fixed proportions (N,); perplexities are not used."""
        return Factors.of(np.array(self.proportions, np.float64))

    def update(
        self, logs: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int, known: Known = NOTHING_ELSE
    ) -> Factors:
        """Return the fixed proportions (N,), the same in every interval."""
        return Factors.of(np.array(self.proportions, np.float64))

    def state_dict(self) -> dict[str, Any]:
        """Return the kind and the proportions."""
        return controller_state(self)


@dataclass(frozen=True)
class Scheduled:
    """Proportions by interval, from the user's file; each stage holds until the next one begins."""

    names: tuple[str, ...]
    stages: tuple[Stage, ...]
    """Stages in ascending order of their first intervals; the first stage begins with interval 0."""
    name: ClassVar[str] = "schedule"
    uses_teacher: ClassVar[bool] = False
    source: ClassVar[str] = "held_out"
    ppl_smoothing: ClassVar[float] = 0.0

    def spreading(self, interval: int) -> tuple[str, ...]:
        """Return nothing: the proportions are the user's own."""
        return ()

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Factors:
        """Return the proportions (N,) of the first stage; perplexities are not used."""
        return self._at(0)

    def update(
        self, logs: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int, known: Known = NOTHING_ELSE
    ) -> Factors:
        """Return the proportions (N,) of the stage that contains `interval`."""
        return self._at(interval)

    def state_dict(self) -> dict[str, Any]:
        """Return the kind and the stages."""
        return controller_state(self)

    def _at(self, interval: int) -> Factors:
        return Factors.of(np.array([stage for first, stage in self.stages if first <= interval][-1], np.float64))


def parse_stages(content: Any, names: Sequence[str], exclude: Sequence[str], *, source: str) -> tuple[Stage, ...]:
    """Return the stages of a schedule, a list of {from_interval: int, proportions: {domain: proportion}}.

    Args:
        content: plain values, as read from YAML.
        source: the file's name, for messages.

    Raises:
        ConfigError: names the file, the entry (from 1), and the domain or value that is wrong.
    """
    if not isinstance(content, list) or not content:
        raise ConfigError(
            f"mixture.schedule_file {source}: holds {type(content).__name__}, expected a list of "
            "{from_interval: 0, proportions: {domain: proportion}} with at least one entry"
        )
    stages: list[Stage] = []
    for number, entry in enumerate(content, 1):
        where = f"mixture.schedule_file {source}, entry {number}"
        if not isinstance(entry, Mapping) or set(entry) != {"from_interval", "proportions"}:
            keys = ", ".join(map(str, entry)) if isinstance(entry, Mapping) else repr(entry)
            raise ConfigError(f"{where}: has {keys or 'no keys'}, expected from_interval and proportions")
        first_interval = _first_interval(entry["from_interval"], stages, where)
        stages.append((first_interval, _stage_proportions(entry, names, exclude, where)))
    return tuple(stages)


def _first_interval(value: Any, stages_before: Sequence[Stage], where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{where}: from_interval is {value!r}: give a whole number")
    if not stages_before and value != 0:
        raise ConfigError(f"{where}: from_interval is {value}: the first entry begins with interval 0")
    if stages_before and value <= stages_before[-1][0]:
        raise ConfigError(
            f"{where}: from_interval is {value} after {stages_before[-1][0]} in the entry before: put them in order"
        )
    return value


def _stage_proportions(
    entry: Mapping[str, Any], names: Sequence[str], exclude: Sequence[str], where: str
) -> tuple[float, ...]:
    proportions = entry["proportions"]
    if not isinstance(proportions, Mapping):
        raise ConfigError(f"{where}: proportions are {proportions!r}: give a number for each domain")
    for domain, value in proportions.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{where}: the proportion of '{domain}' is {value!r}: give a number")
    return proportions_in_order(proportions, names, exclude, label=f"{where}: proportions")
