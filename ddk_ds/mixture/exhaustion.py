"""What happens when a domain has been drawn as often as it may be: go on, give its share away, or end the run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ddk_ds.errors import ConfigError
from ddk_ds.mixture.factors import Vector
from ddk_ds.mixture.order import Ids, largest_remainder

EXHAUSTION_POLICIES = ("cycle", "cap", "stop")


@dataclass(frozen=True)
class Plan:
    """An interval as the proportions ask for it, and as the domains can give it."""

    asked: tuple[int, ...]
    """(N,) samples by the proportions alone."""
    counts: tuple[int, ...]
    """(N,) samples to draw; `asked` unless a domain is at its cap. Empty where the run ends instead."""
    end: str | None = None
    """Why the run ends before this interval; None where it goes on."""


@dataclass(frozen=True)
class Exhaustion:
    """The policy of each domain; a value, and `plan` is a pure function.

    cycle: the domain is drawn for ever, pass after pass (the paper).
    cap: never more draws in the whole run than its limit. An interval takes what is left of it; the rest of what was
    asked goes to the domains that are not at their cap, by their proportions. The run ends before an interval that
    they cannot fill: where all domains with a proportion are at their cap.
    stop: the run ends before the interval that would draw the domain (what it was asked for and what capped domains
    gave away) beyond its limit. So no sample is drawn more often than the limit says, and less than an interval's
    share of the domain may be left over.
    """

    names: tuple[str, ...]
    policies: tuple[str, ...]
    """One of EXHAUSTION_POLICIES a domain."""
    limits: tuple[int | None, ...]
    """Draws of each domain in the whole run; None, for ever, with cycle."""

    def plan(self, proportions: Sequence[float] | Vector, total: int, drawn: Sequence[int]) -> Plan:
        """The next interval: `total` samples by `proportions` (N,) after `drawn` (N,) draws since the run began.

        Raises:
            ConfigError: proportions that are negative, not finite, or do not sum to 1 within 1e-6.
        """
        asked = largest_remainder(proportions, total)
        left = np.array([total if k is None else k - n for k, n in zip(self.limits, drawn, strict=True)], np.int64)
        capped = np.array([policy == "cap" for policy in self.policies])
        counts = _under_caps(np.asarray(proportions, np.float64), asked, np.where(capped, left, total))
        if counts is None:
            return Plan(_tuple(asked), (), self._no_room(capped, left, total))
        for i in np.flatnonzero(counts > left):
            return Plan(_tuple(asked), (), self._stopped(int(i), int(counts[i]), int(left[i])))
        return Plan(_tuple(asked), _tuple(counts))

    def check_first(self, total: int, exclude: Sequence[str] = ()) -> None:
        """Raise ConfigError where not even one interval of `total` samples can be drawn, whatever the proportions.

        `exclude`: domains that are never drawn.
        """
        limits = [limit for name, limit in zip(self.names, self.limits, strict=True) if name not in exclude]
        known = [limit for limit in limits if limit is not None]
        if len(known) == len(limits) and sum(known) < total:
            raise ConfigError(
                f"mixture.max_passes leaves {sum(known):,} samples of all domains together, the first interval needs "
                f"{total:,}: raise it, lower mixture.interval_steps, or let a domain cycle"
            )

    def _no_room(self, capped: Ids, left: Ids, total: int) -> str:
        names = ", ".join(name for name, at_cap in zip(self.names, capped, strict=True) if at_cap)
        return (
            f"domains at their cap ({names}) have {int(left[capped].sum()):,} samples left, too few for an interval "
            f"of {total:,}, and no other domain has a proportion (mixture.exhaustion: cap)"
        )

    def _stopped(self, domain: int, count: int, left: int) -> str:
        return (
            f"domain '{self.names[domain]}' has {left:,} of {self.limits[domain]:,} samples left, the next interval "
            f"asks for {count:,} (mixture.exhaustion: stop)"
        )


def make_exhaustion(
    names: Sequence[str],
    sizes: Sequence[int],
    *,
    default: str = "cycle",
    by_domain: Mapping[str, str] | None = None,
    max_passes: float | None = None,
) -> Exhaustion:
    """The policies of a run.

    Args:
        names, sizes: the domains and their numbers of samples.
        default: policy of the domains that `by_domain` does not name; one of EXHAUSTION_POLICIES.
        max_passes: a domain's limit is this times its samples, rounded down; None is one pass.

    Raises:
        ConfigError: an unknown domain or policy, or a limit of not one sample.
    """
    by_domain = by_domain or {}
    for name in by_domain:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"this run's domains are {', '.join(names)}"
            raise ConfigError(f"mixture.exhaustion_by_domain names '{name}', which is not a domain of this run: {hint}")
    policies = tuple(by_domain.get(name, default) for name in names)
    for policy in policies:
        if policy not in EXHAUSTION_POLICIES:
            raise ConfigError(f"mixture.exhaustion is '{policy}': give one of {', '.join(EXHAUSTION_POLICIES)}")
    # As written: 0.29 x 100 samples are 29, which floats would round down to 28.
    passes = Fraction(1 if max_passes is None else str(max_passes))
    limits: list[int | None] = []
    for name, size, policy in zip(names, sizes, policies, strict=True):
        limits.append(None if policy == "cycle" else int(passes * int(size)))
        if limits[-1] == 0:
            raise ConfigError(
                f"mixture.max_passes is {max_passes}: not one sample of domain '{name}' with its {size}; raise it"
            )
    return Exhaustion(tuple(names), policies, tuple(limits))


def _under_caps(proportions: Vector, asked: Ids, caps: Ids) -> Ids | None:
    """Counts (N,) <= caps with the sum of `asked`: what is over a cap goes to the others by their proportions.

    None where the others have no proportion, or there are none.
    """
    counts = asked.copy()
    full = np.zeros(len(counts), bool)
    while (over := counts > caps).any():
        full |= over
        rest = int(asked.sum() - caps[full].sum())
        weights = proportions[~full]
        if rest and not weights.sum():
            return None
        counts[full] = caps[full]
        counts[~full] = largest_remainder(weights / weights.sum(), rest) if rest else 0
    return counts


def _tuple(counts: Ids) -> tuple[int, ...]:
    return tuple(counts.tolist())
