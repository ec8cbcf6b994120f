"""The state of the data order, and the global sample ids of an interval as a pure function of it.

The order does not depend on ranks, workers or nodes: every process computes the same ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

import numpy as np

from ddk_ds.errors import CheckpointError, ConfigError
from ddk_ds.mixture.domain_vectors import Vector
from ddk_ds.mixture.exhaustion import due_samples, largest_remainder
from ddk_ds.mixture.order import BLOCK_SAMPLES, MIX, DomainOrder, Ids, check_seed, philox

ALGORITHM = "ddk-interval/2"
HISTORY_INTERVALS = 4  # past intervals whose counts are kept; a hash covers all past intervals


class DomainEntry(TypedDict):
    """A domain in a checkpoint; `sha` is a hash of its shards."""

    name: str
    num_samples: int
    sha: str


@dataclass(frozen=True)
class IntervalState:
    """The complete state of the data order, independent of the world size; a checkpoint holds it as JSON.

    It is immutable: `advance`, `begin`, `seal` and `consume` return the next state.
    """

    seed: int
    block: int
    """Least number of samples in a block of the shuffle; see `DomainOrder`."""
    domains: tuple[DomainEntry, ...]
    cursors: tuple[int, ...]
    """(N,) draws of each domain before this interval."""
    interval: int = -1
    """Number of the interval, from 0; -1 before the first."""
    counts: tuple[int, ...] = ()
    """(N,) draws of each domain in this interval."""
    owed: tuple[float, ...] = ()
    """(N,) samples due since the run's begin by the proportions of all intervals, less those drawn, up to the end of
    this interval (`exhaustion.Draws`); empty before the first."""
    consumed: int = 0
    """Samples of this interval that the run has trained on, over all ranks."""
    history: tuple[tuple[int, ...], ...] = ()
    """Counts of the last HISTORY_INTERVALS past intervals; `cursors` are the sums over all of them."""
    history_sha: str = ""
    """Hash of the counts of all past intervals; "" while there is no past interval."""
    ids_sha: str = ""
    """Hash of this interval's sample ids; "" until `seal`."""
    algorithm: str = ALGORITHM

    @classmethod
    def new(cls, domains: Sequence[DomainEntry], *, seed: int, block: int = BLOCK_SAMPLES) -> IntervalState:
        """Return the state before the first interval.

        Raises:
            ConfigError: seed or block is out of range, there is no domain, or two domains have the same name.
        """
        check_seed(seed, block)
        names = [domain["name"] for domain in domains]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"domains are {names}: give at least one, each once")
        return cls(seed, block, tuple(domains), cursors=(0,) * len(names))

    @property
    def total(self) -> int:
        """Number of samples of this interval."""
        return sum(self.counts)

    @property
    def done(self) -> bool:
        """True at the end of the interval, and before the first."""
        return self.consumed == self.total

    @property
    def drawn(self) -> tuple[int, ...]:
        """(N,) draws of each domain up to the end of this interval."""
        if self.interval < 0:
            return self.cursors
        return tuple(cursor + count for cursor, count in zip(self.cursors, self.counts, strict=True))

    def advance(self, proportions: Sequence[float] | Vector, total: int) -> IntervalState:
        """Return the state at the beginning of the next interval, which has `total` samples.

        `proportions` (N,) divide them between the domains, without any limit on the draws of a domain.
        """
        counts = largest_remainder(proportions, total, self.owed)
        return self.begin(counts.tolist(), (due_samples(proportions, total, self.owed) - counts).tolist())

    def begin(self, counts: Sequence[int], owed: Sequence[float]) -> IntervalState:
        """Return the state at the beginning of the next interval, which has `counts` (N,) samples of each domain.

        `owed` (N,) are the samples due that its end still leaves undrawn.
        """
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
            owed=tuple(owed),
            cursors=self.drawn,
            consumed=0,
            history=history,
            history_sha=history_sha,
            ids_sha="",
        )

    def seal(self, ids: Ids) -> IntervalState:
        """Return the state with the hash of `ids`, the sample ids of this interval.

        If the state has a hash already, check that it is the same: a different version of numpy can permute
        differently.

        Raises:
            CheckpointError: the ids, computed again on resume, differ from those of the checkpoint.
        """
        sha = ids_sha(ids)
        if self.ids_sha not in ("", sha):
            raise CheckpointError(
                f"interval {self.interval}: the sample order is {sha}, in the checkpoint {self.ids_sha}: "
                "resume with the numpy version that the run began with"
            )
        return replace(self, ids_sha=sha)

    def consume(self, num_samples: int) -> IntervalState:
        """Return the state after training on `num_samples` more samples of this interval, summed over all ranks.

        An assertion fails if the interval has fewer samples left.
        """
        consumed = self.consumed + num_samples
        assert num_samples >= 0 and consumed <= self.total, f"{consumed} of {self.total} samples consumed"
        return replace(self, consumed=consumed)

    def check_fits(self, fresh: IntervalState) -> None:
        """Check that this state, from a checkpoint, belongs to the data order of `fresh`, the new state of this run.

        Raises:
            CheckpointError: the seed, the block size of the shuffle or the domains differ; the message has both values.
        """
        for key in ("seed", "block", "domains"):
            saved, current = getattr(self, key), getattr(fresh, key)
            if saved != current:
                raise CheckpointError(
                    f"the checkpoint's data order has {key} {saved}, this run {current}: "
                    "resume with the run's own data and seed, or start another run directory"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain JSON: a few kB for ten domains, after any number of intervals."""
        record: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples as lists
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> IntervalState:
        """Return the state that `to_json` wrote into `record`.

        Raises:
            CheckpointError: the algorithm of `record` is not ALGORITHM, or a field is missing or unknown.
        """
        if record.get("algorithm") != ALGORITHM:
            raise CheckpointError(
                f"the checkpoint's data order is '{record.get('algorithm')}', this version's '{ALGORITHM}': "
                "resume with the version of ddk_ds that wrote it"
            )
        if mismatched := set(record) ^ set(cls.__dataclass_fields__):
            raise CheckpointError(f"the checkpoint's data order has missing or unknown fields: {sorted(mismatched)}")
        tuples = {key: tuple(record[key]) for key in ("domains", "counts", "owed", "cursors")}
        history = tuple(tuple(counts) for counts in record["history"])
        return cls(**{**record, **tuples, "history": history})


def interval_ids(orders: Sequence[DomainOrder], sample_offsets: Sequence[int] | Ids, state: IntervalState) -> Ids:
    """Return the global sample ids (total,) of the state's interval, in the order of training. It is a pure function.

    Args:
        orders: one for each of the N domains, in the order of `state.domains`.
        sample_offsets: (N,) global id of each domain's sample 0.
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
    """Return a hash of a sequence of ids: 16 hex digits, the same on every machine."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()[:16]


def _chained(sha: str, counts: Sequence[int]) -> str:
    return hashlib.sha256(f"{sha} {' '.join(map(str, counts))}".encode()).hexdigest()[:16]
