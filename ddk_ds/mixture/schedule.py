"""The data order: (seed, interval, proportions, cursors) -> global sample ids of a distillation interval.

Nothing here knows of ranks, workers or nodes: every process that asks gets the same order. A domain's draws
are an endless lazy sequence that depends on the seed, the domain's name and its shards alone, so that adding
a domain or changing the proportions leaves what a domain yields, draw by draw, as it was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ddk_ds.errors import CheckpointError, ConfigError, DataError
from ddk_ds.mixture.factors import Vector, check_proportions

Ids = NDArray[np.int64]

ALGORITHM = "ddk-interval/1"
BLOCK_SAMPLES = 65536
_SHARDS, _SAMPLES, _MIX = range(3)  # what a random stream is for


def largest_remainder(proportions: Sequence[float] | Vector, total: int) -> Ids:
    """Integer counts (N,) with sum `total` and |count - proportion * total| < 1; ties go to the lower index.

    Raises:
        ConfigError: proportions that are negative, not finite, or do not sum to 1 within 1e-6; total < 0.
    """
    if total < 0:
        raise ConfigError(f"{total} samples an interval: give 0 or more")
    checked = check_proportions(proportions, num_domains=len(proportions), what="proportions")
    # math.fsum is exact: the counts are the same on every machine.
    exact = checked / math.fsum(checked) * total
    counts: Ids = np.floor(exact).astype(np.int64)
    largest_first = np.argsort(counts - exact, kind="stable")
    counts[largest_first[: total - int(counts.sum())]] += 1
    return counts


class DomainOrder:
    """The endless sequence of one domain's draws. Pass p is a permutation of its samples.

    Shard-aware and lazy: each pass permutes the shards, cuts them into blocks of at least `block` samples and
    permutes the samples inside a block. take(a, b) costs O(b - a + block), and at any cursor the shards of at
    most two blocks are in use, which bounds a cache.
    """

    def __init__(self, name: str, shard_sizes: Sequence[int] | Ids, seed: int, block: int = BLOCK_SAMPLES) -> None:
        """`shard_sizes`: samples of each shard; `block`: samples, >= 1.

        Raises:
            DataError: the domain has no samples, or a shard a negative number.
            ConfigError: seed or block out of range.
        """
        _check_seed(seed, block)
        self.name, self.seed, self.block = name, seed, block
        self.shard_sizes = np.array(shard_sizes, np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        if self.num_samples < 1 or (self.shard_sizes < 0).any():
            raise DataError(
                f"domain '{name}' has {self.num_samples} training samples in its shards: it needs at least 1"
            )
        self._offsets = np.cumsum(self.shard_sizes) - self.shard_sizes
        self._pass: tuple[int, Ids, list[Ids]] | None = None

    def take(self, start: int, stop: int) -> Ids:
        """Domain-local ids (stop - start,) of the draws start..stop-1, counted from the start of training."""
        assert 0 <= start <= stop, f"draws {start}..{stop} of domain '{self.name}'"
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            number, first = divmod(start, self.num_samples)
            last = min(self.num_samples, first + stop - start)
            parts.append(self._take_in_pass(number, first, last))
            start += last - first
        return np.concatenate(parts)

    def shards_of(self, start: int, stop: int) -> Ids:
        """The shards that the draws start..stop-1 touch, each once, in the order of first use."""
        shards = np.searchsorted(self._offsets, self.take(start, stop), "right") - 1
        _, first_use = np.unique(shards, return_index=True)
        in_order: Ids = shards[np.sort(first_use)]
        return in_order

    def _take_in_pass(self, number: int, first: int, last: int) -> Ids:
        ends, groups = self._blocks(number)
        parts = []
        first_block, last_block = np.searchsorted(ends, [first, last - 1], "right").tolist()
        for k in range(first_block, last_block + 1):
            ids = np.concatenate(
                [np.arange(self._offsets[s], self._offsets[s] + self.shard_sizes[s]) for s in groups[k]]
            )
            begin = int(ends[k]) - len(ids)
            ids = _generator(self.seed, _name_key(self.name), _SAMPLES, number, k).permutation(ids)
            parts.append(ids[max(0, first - begin) : last - begin])
        return np.concatenate(parts)

    def _blocks(self, number: int) -> tuple[Ids, list[Ids]]:
        """Of pass `number`: the draws before each block's end, and each block's shards."""
        if self._pass is None or self._pass[0] != number:
            generator = _generator(self.seed, _name_key(self.name), _SHARDS, number)
            shards = generator.permutation(np.flatnonzero(self.shard_sizes))
            ends = np.cumsum(self.shard_sizes[shards])
            cuts = [0]
            while cuts[-1] < len(shards):
                filled = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
                cuts.append(min(int(np.searchsorted(ends, filled + self.block)) + 1, len(shards)))
            groups = [shards[a:b] for a, b in itertools.pairwise(cuts)]
            self._pass = (number, ends[np.array(cuts[1:]) - 1], groups)
        return self._pass[1], self._pass[2]


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
    """Counts of the past intervals."""
    ids_sha: str = ""
    """`ids_sha` of this interval's sample ids; "" until sealed."""
    algorithm: str = ALGORITHM

    @classmethod
    def new(cls, domains: Sequence[DomainEntry], *, seed: int, block: int = BLOCK_SAMPLES) -> IntervalState:
        """The state before the first interval.

        Raises:
            ConfigError: seed or block out of range, no domain, or a name twice.
        """
        _check_seed(seed, block)
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

    def advance(self, proportions: Sequence[float] | Vector, total: int) -> IntervalState:
        """The beginning of the next interval: `total` samples drawn by `proportions` (N,)."""
        assert self.done, f"interval {self.interval} has {self.consumed} of {self.total} samples behind it"
        assert len(proportions) == len(self.domains), f"{len(proportions)} for {len(self.domains)} domains"
        cursors, history = self.cursors, self.history
        if self.interval >= 0:
            cursors = tuple(cursor + count for cursor, count in zip(cursors, self.counts, strict=True))
            history = (*history, self.counts)
        return replace(
            self,
            interval=self.interval + 1,
            counts=tuple(largest_remainder(proportions, total).tolist()),
            cursors=cursors,
            consumed=0,
            history=history,
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
        """Plain JSON; a few kB."""
        record: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples as lists
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> IntervalState:
        """The state that `to_json` wrote.

        Raises:
            CheckpointError: another algorithm, or fields that are missing or unknown.
        """
        if record.get("algorithm") != ALGORITHM:
            raise CheckpointError(
                f"the checkpoint's data order is '{record.get('algorithm')}', this version's '{ALGORITHM}': "
                "resume with the version of ddk_ds that wrote it"
            )
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
    labels = _generator(state.seed, 0, _MIX, state.interval).permutation(labels)
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


def _check_seed(seed: int, block: int) -> None:
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"seed is {seed}: give an integer from 0 to 2^64 - 1")
    if block < 1:
        raise ConfigError(f"block is {block} samples: give 1 or more")


def _name_key(name: str) -> int:
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=8).digest(), "big")


def _generator(seed: int, name_key: int, purpose: int, number: int, block: int = 0) -> np.random.Generator:
    """A Philox generator for each key."""
    # Each part has its fixed number of 32-bit words: SeedSequence joins and pads, so others could meet.
    words = [seed & 0xFFFFFFFF, seed >> 32, name_key & 0xFFFFFFFF, name_key >> 32, purpose, number, block]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
