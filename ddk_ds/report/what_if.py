"""What every controller would have decided from one run's measurements, and how much of it a teacher's cache holds.

The student would have been another one with another mixture, so only its first decision is certain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ddk_ds.config import Config
from ddk_ds.data.loader import MixtureDataset
from ddk_ds.data.manifest import load_manifest
from ddk_ds.data.teacher_cache import PERPLEXITIES, Numbers, open_stored
from ddk_ds.data.teacher_perplexities import measured_in
from ddk_ds.data.teacher_place import open_place
from ddk_ds.drawing import Array
from ddk_ds.errors import DataError
from ddk_ds.files import read_object
from ddk_ds.mixture.decide import Controller, Decision
from ddk_ds.mixture.exhaustion import Exhausted, Exhaustion
from ddk_ds.mixture.order import DomainOrder
from ddk_ds.report.replayed_decisions import RecordedRun, decide_otherwise

CAVEAT = (
    "All of it is from the perplexities that this run's student had. With another mixture the student would have been "
    "another one from the first interval on, and later measurements and decisions would differ: the first decision is "
    "certain, each later one only says what the controller makes of this run. It does not say which mixture is better."
)


@dataclass(frozen=True)
class Stock:
    """The samples of the run's domains: the order of their draws, and which of them a teacher's cache holds."""

    orders: list[DomainOrder]
    known: list[Numbers] | None
    """N arrays of sample numbers; None without a cache."""


@dataclass(frozen=True)
class WouldBe:
    """One controller's decisions and draws from a run's measurements; T intervals, N domains."""

    name: str
    own: bool
    """True for the run's own controller."""
    decisions: list[Decision]
    counts: list[tuple[int, ...]]
    """T times (N,) samples drawn; fewer where the domains would have run out."""
    ended: str
    """Reason why the run would have ended before its last interval, or ""."""
    distances: Array
    """(T,) share of the samples that would have gone to another domain: half the sum of absolute differences."""
    mean_distance: float
    """Mean of `distances` by the intervals' samples."""
    distinct: list[int] | None
    """(N,) samples drawn at least once; None where the data cannot be read."""
    cached: list[int] | None
    """(N,) those of `distinct` that the cache holds; None without a cache."""

    @property
    def title(self) -> str:
        """Return its name in tables and pictures, in which the run's own is marked."""
        return f"{self.name} (as run)" if self.own else self.name

    @property
    def samples(self) -> list[int]:
        """Return the samples drawn of each domain, (N,)."""
        return np.array(self.counts, np.int64).reshape(-1, len(self.decisions[0].proportions)).sum(0).tolist()


def what_if(
    controller: Controller,
    run: RecordedRun,
    exhaustion: Exhaustion,
    sequence_length: int,
    stock: Stock | None,
    *,
    own: bool,
) -> WouldBe:
    """Return what a controller, the run's `own` or another, would have decided and drawn from a run's measurements.

    A fork's first interval is as it was run. Raises DataError where the controller needs a teacher's perplexities and
    there are none.
    """
    decisions = decide_otherwise(controller, run.decisions)
    # A sample has one target less than tokens.
    before = [tokens // (sequence_length - 1) for tokens in run.decisions[0].tokens]
    counts, ended = _draws(decisions, run, exhaustion, before)
    as_run = np.array([entry.decision.proportions for entry in run.decisions])
    distances = 0.5 * np.abs(np.array([decision.proportions for decision in decisions]) - as_run).sum(1)
    samples = np.array([sum(entry.asked) for entry in run.decisions], np.float64)
    distinct = cached = None
    if stock is not None:
        drawn = np.array(counts, np.int64).reshape(-1, len(before)).sum(0)
        ids = [
            np.unique(order.take(start, start + int(count)))
            for order, start, count in zip(stock.orders, before, drawn, strict=True)
        ]
        distinct = [len(each) for each in ids]
        if stock.known is not None:
            cached = [int(np.isin(each, known).sum()) for each, known in zip(ids, stock.known, strict=True)]
    mean = float(samples @ distances / samples.sum())
    return WouldBe(controller.name, own, decisions, counts, ended, distances, mean, distinct, cached)


def _draws(
    decisions: Sequence[Decision], run: RecordedRun, exhaustion: Exhaustion, before: Sequence[int]
) -> tuple[list[tuple[int, ...]], str]:
    """Return the samples of each interval (N,), and why the run would have ended early, or ""."""
    counts: list[tuple[int, ...]] = []
    owed: Sequence[float] = ()
    drawn = list(before)
    for entry, decision in zip(run.decisions, decisions, strict=True):
        if not counts and entry.interval > 0:  # a fork's first
            of_interval, owed = entry.counts, entry.owed
        else:
            try:
                draws = exhaustion.draws(decision.proportions, sum(entry.asked), drawn, owed)
            except Exhausted as exhausted:
                return counts, f"it would have ended before interval {entry.interval}: {exhausted}"
            of_interval, owed = draws.counts, draws.owed
        counts.append(of_interval)
        drawn = [sum(pair) for pair in zip(drawn, of_interval, strict=True)]
    return counts, ""


def check_counts(run: RecordedRun, run_dir: Path) -> None:
    """Raise DataError if it is not known how many samples had been drawn before the run's first decision."""
    path = run_dir / "run.json"
    recorded = read_object(path, "put it back from a copy") if path.is_file() else {}
    if recorded.get("content.documents") == "masked" and any(run.decisions[0].tokens):
        raise DataError(
            f"{run_dir} was forked, and its documents do not see each other: its tokens do not say how many samples "
            "had been drawn before; ask the run that it was forked from"
        )


def open_stock(config: Config, run_dir: Path, names: Sequence[str], cache: str | None) -> Stock:
    """Open the data of a run, and a cache of its teacher. Raises UserError where they cannot be read or are others."""
    data = Path(config.data.path)
    if not data.is_dir():
        raise DataError(f"data.path {config.data.path} is not on this machine")
    path = run_dir / "run.json"
    recorded = read_object(path, "put it back from a copy") if path.is_file() else {}
    for name, domain in load_manifest(data).domains.items():
        if recorded.get(f"content.domains.{name}", domain.fingerprint) != domain.fingerprint:
            raise DataError(f"data.path {data}: its domain {name} has other samples than when the run was started")
    dataset = MixtureDataset(data, names)
    orders = [DomainOrder(name, sizes, config.seed) for name, sizes in zip(names, dataset.order_sizes, strict=True)]
    if cache is None:
        return Stock(orders, None)
    stored = open_stored(open_place(cache, config.data), dict(zip(names, dataset.shas, strict=True)))
    return Stock(orders, [stored.known(name) for name in names])


def cached_teacher(run_dir: Path, names: Sequence[str], cache: Path) -> Array | None:
    """Return the perplexities (N,) of the cache's teacher on a run's held-out samples; None if they are not there.

    They are not where measurements under several conditions differ by more than a thousandth. Raises UserError if
    run.json cannot be read.
    """
    path = run_dir / "run.json"
    recorded = read_object(path, "put it back from a copy") if path.is_file() else {}
    files = measured_in(cache / PERPLEXITIES)
    values = []
    for name in names:
        held_out = str(recorded.get(f"content.domains.{name}", "")).partition("/")[2]
        found = [
            file["perplexity"]
            for file in files
            if file.get("validation") == held_out and _measured_alike(file, recorded)
        ]
        if not found or max(found) > 1.001 * min(found):
            return None
        values.append(found[0])
    return np.array(values)


def _measured_alike(file: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    keys = ("data.validation_samples", "data.sequence_length", "train.precision", "content.documents")
    return all(file.get(key) == recorded.get(key) for key in keys)


def what_if_tables(found: Sequence[WouldBe], run: RecordedRun) -> list[Table]:
    """Return a table with a row for each controller, and one with a row for each domain."""
    title = "what each controller would have decided; elsewhere: the share of the samples to another domain than as run"
    controllers = Table(title=title, title_justify="left")
    controllers.add_column("controller", overflow="fold")
    for heading in SUMMARY_HEADINGS:
        controllers.add_column(heading, justify="right")
    for would_be in found:
        controllers.add_row(would_be.title, *summary_cells(would_be, run))
    domains = Table(title="samples of each domain (share of them in the cache)", title_justify="left")
    domains.add_column("domain", overflow="fold")
    for would_be in found:
        domains.add_column(would_be.title, justify="right", overflow="fold")
    for place, domain in enumerate(run.domains):
        domains.add_row(domain, *(sample_cell(would_be, place) for would_be in found))
    return [controllers, domains]


SUMMARY_HEADINGS = ("elsewhere, mean", "at most", "in interval", "samples, each once", "of them not in the cache")


def summary_cells(would_be: WouldBe, run: RecordedRun) -> list[str]:
    """Return the cells of a controller's row under SUMMARY_HEADINGS."""
    furthest = int(would_be.distances.argmax())
    distinct = "not known" if would_be.distinct is None else f"{sum(would_be.distinct):,}"
    missing = "not known"
    if would_be.distinct is not None and would_be.cached is not None:
        missing = f"{sum(would_be.distinct) - sum(would_be.cached):,}"
    return [
        f"{would_be.mean_distance:.1%}",
        f"{would_be.distances[furthest]:.1%}",
        str(run.decisions[furthest].interval),
        distinct,
        missing,
    ]


def sample_cell(would_be: WouldBe, place: int) -> str:
    """Return the samples that would have been drawn of a domain, and the share of them that the cache holds."""
    samples = f"{would_be.samples[place]:,}"
    if would_be.cached is None or would_be.distinct is None:
        return samples
    if not would_be.distinct[place]:
        return f"{samples} (-)"
    return f"{samples} ({would_be.cached[place] / would_be.distinct[place]:.0%})"


def what_if_json(found: Sequence[WouldBe], refused: Mapping[str, str], run: RecordedRun) -> dict[str, Any]:
    """Return everything as plain JSON values."""

    def by_domain(values: Sequence[Any] | None) -> dict[str, Any] | None:
        return None if values is None else dict(zip(run.domains, values, strict=True))

    controllers = []
    for would_be in found:
        rows = [
            {
                "interval": entry.interval,
                "step": entry.step,
                "proportions": by_domain(decision.proportions),
                "counts": by_domain(would_be.counts[place]) if place < len(would_be.counts) else None,
                "distance": float(would_be.distances[place]),
            }
            for place, (entry, decision) in enumerate(zip(run.decisions, would_be.decisions, strict=True))
        ]
        numbers = {key: by_domain(getattr(would_be, key)) for key in ("samples", "distinct", "cached")}
        known = {"controller": would_be.name, "own": would_be.own, "mean_distance": would_be.mean_distance}
        controllers.append({**known, "ended": would_be.ended, **numbers, "intervals": rows})
    return {"caveat": CAVEAT, "not_replayable": dict(refused), "controllers": controllers}
