"""The data order: (seed, interval, counts, cursors) -> global sample ids of a distillation interval.

Nothing here knows of ranks, workers or nodes: every process that asks gets the same order.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

import numpy as np

from ddk_ds.errors import CheckpointError, ConfigError
from ddk_ds.mixture.factors import Vector
from ddk_ds.mixture.order import BLOCK_SAMPLES, MIX, DomainOrder, Ids, check_seed, largest_remainder, philox

ALGORITHM = "ddk-interval/1"
HISTORY_INTERVALS = 4  # kept in full; a hash stands for all of them


class DomainEntry(TypedDict):
    """One domain as a checkpoint knows it; `sha` is a hash of its shards."""

    name: str
    num_samples: int
    sha: str


@dataclass(frozen=True)
class IntervalState:
    """All the state that the data order has, free of the world size. It goes to the checkpoint as JSON.

    A value: `advance`, `seal` and `consume` return the state that follows.
    """

    seed: int
    block: int
    domains: tuple[DomainEntry, ...]
    cursors: tuple[int, ...]
    """Draws of each domain before this interval."""
    interval: int = -1
    """Number of the interval, from 0; -1 before the first."""
    counts: tuple[int, ...] = ()
    """Draws of each domain in this interval."""
    consumed: int = 0
    """Samples of this interval that were trained on, over all ranks."""
    history: tuple[tuple[int, ...], ...] = ()
    """Counts of the last HISTORY_INTERVALS past intervals; `cursors` are the sums over all of them."""
    history_sha: str = ""
    """Chained over the counts of every past interval: two runs with the same one drew the same. "" before the first."""
    ids_sha: str = ""
    """`ids_sha` of this interval's sample ids; "" until sealed."""
    algorithm: str = ALGORITHM

    @classmethod
    def new(cls, domains: Sequence[DomainEntry], *, seed: int, block: int = BLOCK_SAMPLES) -> IntervalState:
        """The state before the first interval.

        Raises:
            ConfigError: seed or block out of range, no domain, or a name twice.
        """
        check_seed(seed, block)
        names = [domain["name"] for domain in domains]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"domains are {names}: give at least one, each once")
        return cls(seed, block, tuple(domains), cursors=(0,) * len(names))

    @property
    def total(self) -> int:
        """Samples of this interval."""
        return sum(self.counts)

    @property
    def done(self) -> bool:
        """Whether the interval is at its end (true before the first)."""
        return self.consumed == self.total

    @property
    def drawn(self) -> tuple[int, ...]:
        """Draws of each domain up to the end of this interval."""
        if self.interval < 0:
            return self.cursors
        return tuple(cursor + count for cursor, count in zip(self.cursors, self.counts, strict=True))

    def advance(self, proportions: Sequence[float] | Vector, total: int) -> IntervalState:
        """The beginning of the next interval: `total` samples drawn by `proportions` (N,), without limits."""
        return self.begin(largest_remainder(proportions, total).tolist())

    def begin(self, counts: Sequence[int]) -> IntervalState:
        """The beginning of the next interval: `counts` (N,) samples of each domain."""
        assert self.done, f"interval {self.interval} has {self.consumed} of {self.total} samples behind it"
        assert len(counts) == len(self.domains), f"{len(counts)} for {len(self.domains)} domains"
        history, history_sha = self.history, self.history_sha
        if self.interval >= 0:
            history = (*history, self.counts)[-HISTORY_INTERVALS:]
            history_sha = _chained(history_sha, self.counts)
        return replace(
            self,
            interval=self.interval + 1,
            counts=tuple(counts),
            cursors=self.drawn,
            consumed=0,
            history=history,
            history_sha=history_sha,
            ids_sha="",
        )

    def seal(self, ids: Ids) -> IntervalState:
        """With the hash of this interval's ids. A state that has one already must get the same.

        numpy does not promise that a generator's permutations stay the same over its versions.

        Raises:
            CheckpointError: the ids, made again on resume, are not those that the state was sealed with.
        """
        sha = ids_sha(ids)
        if self.ids_sha not in ("", sha):
            raise CheckpointError(
                f"interval {self.interval}: the sample order is {sha}, in the checkpoint {self.ids_sha}: "
                "resume with the numpy version that the run began with"
            )
        return replace(self, ids_sha=sha)

    def consume(self, num_samples: int) -> IntervalState:
        """`num_samples` further on in this interval, over all ranks."""
        consumed = self.consumed + num_samples
        assert num_samples >= 0 and consumed <= self.total, f"{consumed} of {self.total} samples consumed"
        return replace(self, consumed=consumed)

    def check_fits(self, fresh: IntervalState) -> None:
        """Refuses a state, from a checkpoint, whose data, seed or block are not those of `fresh`.

        Raises:
            CheckpointError: names the first thing that differs.
        """
        for key in ("seed", "block", "domains"):
            saved, current = getattr(self, key), getattr(fresh, key)
            if saved != current:
                raise CheckpointError(
                    f"the checkpoint's data order has {key} {saved}, this run {current}: "
                    "resume with the run's own data and seed, or start another run directory"
                )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; a few kB for ten domains, after any number of intervals."""
        record: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples as lists
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> IntervalState:
        """The state that `to_json` wrote, or its older form with the counts of every past interval.

        Raises:
            CheckpointError: another algorithm, or fields that are missing or unknown.
        """
        if record.get("algorithm") != ALGORITHM:
            raise CheckpointError(
                f"the checkpoint's data order is '{record.get('algorithm')}', this version's '{ALGORITHM}': "
                "resume with the version of ddk_ds that wrote it"
            )
        if "history_sha" not in record and "history" in record:
            record = {**record, **_short_history(record["history"])}
        if odd := set(record) ^ set(cls.__dataclass_fields__):
            raise CheckpointError(f"the checkpoint's data order has missing or unknown fields: {sorted(odd)}")
        tuples = {key: tuple(record[key]) for key in ("domains", "counts", "cursors")}
        history = tuple(tuple(counts) for counts in record["history"])
        return cls(**{**record, **tuples, "history": history})


def interval_ids(orders: Sequence[DomainOrder], sample_offsets: Sequence[int] | Ids, state: IntervalState) -> Ids:
    """Global sample ids (total,) of the state's interval, in global order; pure.

    Args:
        orders: one a domain, as in state.domains.
        sample_offsets: (N,) the global id of each domain's sample 0.
    """
    labels = np.repeat(np.arange(len(state.counts)), state.counts)
    labels = philox(state.seed, 0, MIX, state.interval).permutation(labels)
    draws = [
        offset + order.take(cursor, cursor + count)
        for order, offset, cursor, count in zip(orders, sample_offsets, state.cursors, state.counts, strict=True)
    ]
    ids = np.empty(len(labels), np.int64)
    ids[np.argsort(labels, kind="stable")] = np.concatenate(draws)
    return ids


def ids_sha(ids: Ids) -> str:
    """16 hex digits that stand for a sequence of ids, the same on every machine."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()[:16]


def _chained(sha: str, counts: Sequence[int]) -> str:
    return hashlib.sha256(f"{sha} {' '.join(map(str, counts))}".encode()).hexdigest()[:16]


def _short_history(history: Sequence[Sequence[int]]) -> dict[str, Any]:
    return {"history": history[-HISTORY_INTERVALS:], "history_sha": functools.reduce(_chained, history, "")}
