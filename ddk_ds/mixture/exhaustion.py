"""From proportions to each domain's number of samples, with the limits on how often a domain is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ddk_ds.errors import ConfigError
from ddk_ds.mixture.domain_vectors import Vector, check_domains, check_proportions
from ddk_ds.mixture.order import Ids


def largest_remainder(proportions: Sequence[float] | Vector, total: int, owed: Sequence[float] = ()) -> Ids:
    """Return integer counts (N,) with sum `total`, as near as they can be to `due_samples`.

    A domain whose proportion is 0 gets none. Ties go to the lower index. Counts are within one sample of what is due
    wherever proportion * total is at least 1; raises as `due_samples` does.
    """
    return _apportion(due_samples(proportions, total, owed), total, np.asarray(proportions) > 0)


def due_samples(proportions: Sequence[float] | Vector, total: int, owed: Sequence[float] = ()) -> Vector:
    """Return what is due (N,) in an interval of `total` samples: its proportions of them, and what is owed from before.

    Args:
        owed: (N,) what was due in all intervals before, less what was drawn; empty: nothing.

    Raises:
        ConfigError: proportions that are negative, not finite, or do not sum to 1 within 1e-6; total < 0.
    """
    if total < 0:
        raise ConfigError(f"{total} samples an interval: give 0 or more")
    checked = check_proportions(proportions, num_domains=len(proportions), label="proportions")
    # math.fsum is exact: the counts are the same on every machine.
    exact: Vector = checked / math.fsum(checked) * total
    return exact + np.asarray(owed, np.float64) if len(owed) else exact


def _apportion(due: Vector, total: int, drawable: NDArray[np.bool_]) -> Ids:
    """Return integer counts (N,) >= 0 with sum `total`: whole parts of `due`, and the rest to the largest remainders.

    Domains that are not `drawable` get none. A domain drawn too often before can have less than 0 due.
    """
    counts = np.where(drawable, np.maximum(np.floor(due), 0), 0).astype(np.int64)
    # More than one pass only where a domain due less than 0, or one that is not drawable, leaves it to the others.
    while short := total - int(counts.sum()):
        candidates = np.flatnonzero(drawable if short > 0 else counts > 0)
        behind = (due - counts)[candidates]
        first = np.argsort(-behind if short > 0 else behind, kind="stable")[: abs(short)]
        counts[candidates[first]] += 1 if short > 0 else -1
    return counts


@dataclass(frozen=True)
class Draws:
    """The samples that an interval draws from each of N domains."""

    asked: tuple[int, ...]
    """(N,) what is due, in whole samples."""
    counts: tuple[int, ...]
    """(N,) what is drawn: `asked`, except where a domain is at its cap."""
    owed: tuple[float, ...]
    """(N,) what is due since the run's begin less what is drawn, `counts` included. What a capped domain gives to the
    others is due to them, and no longer to it."""


class Exhausted(Exception):
    """The domains cannot fill the next interval, so the run ends before it. The message says why."""


@dataclass(frozen=True)
class Exhaustion:
    """The exhaustion policy and the limit of each domain.

    cycle: the domain is drawn without limit, pass after pass (the paper).
    cap: the domain is never drawn beyond its limit. An interval takes the draws that are left; the other domains get
    the rest of its samples, by their proportions. The run ends before an interval that the other domains cannot fill,
    because each domain with a proportion is at its cap.
    stop: the run ends before the interval that would draw the domain beyond its limit, counting the samples that capped
    domains gave to it. Less than an interval's samples of the domain can be left over.
    """

    names: tuple[str, ...]
    policies: tuple[str, ...]
    """(N,) "cycle", "cap" or "stop"."""
    limits: tuple[int | None, ...]
    """(N,) limits on the draws in the complete run; None for a domain that cycles."""

    def draws(
        self, proportions: Sequence[float] | Vector, total: int, drawn: Sequence[int], owed: Sequence[float]
    ) -> Draws:
        """Return the draws of the next interval, `total` samples together.

        They follow `proportions` (N,) by `largest_remainder`, except where a domain is at its cap.

        Args:
            drawn, owed: (N,) draws of each domain since the run began, and `Draws.owed` of the interval before.

        Raises:
            Exhausted: the domains cannot fill the interval; the run ends before it.
            ConfigError: proportions that are negative, not finite, or do not sum to 1 within 1e-6.
        """
        due, shares = due_samples(proportions, total, owed), np.asarray(proportions, np.float64)
        asked = _apportion(due, total, shares > 0)
        left = np.array([total if k is None else k - n for k, n in zip(self.limits, drawn, strict=True)], np.int64)
        capped = np.array([policy == "cap" for policy in self.policies])
        found = _under_caps(shares, due, asked, np.where(capped, left, total))
        if found is None:
            raise Exhausted(self._no_room(capped, left, total))
        counts, still_owed = found
        for i in np.flatnonzero(counts > left):
            raise Exhausted(self._stopped(int(i), int(counts[i]), int(left[i])))
        return Draws(tuple(asked.tolist()), tuple(counts.tolist()), tuple(still_owed.tolist()))

    def check_first(self, total: int, exclude: Sequence[str] = ()) -> None:
        """Raise ConfigError if no proportions allow even one interval of `total` samples.

        `exclude` names the domains that are never drawn.
        """
        limits = [limit for name, limit in zip(self.names, self.limits, strict=True) if name not in exclude]
        finite = [limit for limit in limits if limit is not None]
        if len(finite) == len(limits) and sum(finite) < total:
            raise ConfigError(
                f"mixture.max_passes leaves {sum(finite):,} samples of all domains together, the first interval needs "
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


class ExhaustionOptions(Protocol):
    """The options of section `mixture` for domains that reach a limit (declared in ddk_ds.config.mixture_options)."""

    max_passes: float | None

    @property
    def exhaustion(self) -> str:
        """Policy ("cycle", "cap" or "stop") of the domains that `exhaustion_by_domain` does not name."""

    @property
    def exhaustion_by_domain(self) -> Mapping[str, str]:
        """Policy of each domain named here, which replaces `exhaustion` for that domain."""


def make_exhaustion(options: ExhaustionOptions, sizes: Mapping[str, int]) -> Exhaustion:
    """Return the policies and limits of a run.

    A domain's limit is `max_passes` times its samples, rounded down; one pass if `max_passes` is None.

    Args:
        sizes: number of samples of each domain, in the order of the run's domains.

    Raises:
        ConfigError: the options name an unknown domain, or a limit is less than one sample.
    """
    names, max_passes = tuple(sizes), options.max_passes
    check_domains(options.exhaustion_by_domain, names, label="mixture.exhaustion_by_domain")
    policies = tuple(options.exhaustion_by_domain.get(name, options.exhaustion) for name in names)
    # Exact, as in the configuration: 0.29 x 100 samples are 29, and floats would give 28.
    passes = Fraction(1 if max_passes is None else str(max_passes))
    limits: list[int | None] = []
    for (name, size), policy in zip(sizes.items(), policies, strict=True):
        limits.append(None if policy == "cycle" else int(passes * int(size)))
        if limits[-1] == 0:
            raise ConfigError(
                f"mixture.max_passes is {max_passes}: less than one of the {size} samples of domain '{name}'; raise it"
            )
    return Exhaustion(names, policies, tuple(limits))


def _under_caps(shares: Vector, due: Vector, asked: Ids, caps: Ids) -> tuple[Ids, Vector] | None:
    """Return counts (N,) with the sum of `asked` and none above its cap, and what is still owed after them (N,).

    What is due above a cap goes to the domains below theirs, by their `shares`. Return None if all those domains have
    the share 0.
    """
    counts, full = asked.copy(), np.zeros(len(asked), bool)
    now_due = due
    while (over := counts > caps).any():
        full |= over
        rest = int(asked.sum() - caps[full].sum())
        others = np.where(full, 0.0, shares)
        if others.any():
            others /= math.fsum(others)
        elif rest:
            return None
        now_due = np.where(full, caps, due + math.fsum(due[full] - caps[full]) * others)
        counts = np.where(full, caps, _apportion(now_due, rest, ~full & (shares > 0)))
    return counts, now_due - counts
