"""From proportions to whole numbers of samples.

One domain's draws: an endless lazy sequence of shard-aware permutations.

It depends on the seed, the domain's name and its shards alone, so that adding a domain or changing the proportions
leaves what a domain yields, draw by draw, as it was.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ddk_ds.errors import ConfigError, DataError
from ddk_ds.mixture.factors import Vector, check_proportions

Ids = NDArray[np.int64]


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


BLOCK_SAMPLES = 65536
SHARDS, SAMPLES, MIX = range(3)  # what a random stream is for


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
        check_seed(seed, block)
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
            sizes = self.shard_sizes[groups[k]]
            begins = np.cumsum(sizes) - sizes  # where each shard begins in the block
            ids = np.repeat(self._offsets[groups[k]] - begins, sizes) + np.arange(sizes.sum())
            begin = int(ends[k]) - len(ids)
            ids = philox(self.seed, _name_key(self.name), SAMPLES, number, k).permutation(ids)
            parts.append(ids[max(0, first - begin) : last - begin])
        return np.concatenate(parts)

    def _blocks(self, number: int) -> tuple[Ids, list[Ids]]:
        """Of pass `number`: the draws before each block's end, and each block's shards."""
        if self._pass is None or self._pass[0] != number:
            generator = philox(self.seed, _name_key(self.name), SHARDS, number)
            shards = generator.permutation(np.flatnonzero(self.shard_sizes))
            ends = np.cumsum(self.shard_sizes[shards])
            cuts = [0]
            while cuts[-1] < len(shards):
                filled = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
                cuts.append(min(int(np.searchsorted(ends, filled + self.block)) + 1, len(shards)))
            groups = [shards[a:b] for a, b in itertools.pairwise(cuts)]
            self._pass = (number, ends[np.array(cuts[1:]) - 1], groups)
        return self._pass[1], self._pass[2]


def check_seed(seed: int, block: int) -> None:
    """Raise ConfigError where seed or block is out of range."""
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"seed is {seed}: give an integer from 0 to 2^64 - 1")
    if block < 1:
        raise ConfigError(f"block is {block} samples: give 1 or more")


def _name_key(name: str) -> int:
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=8).digest(), "big")


def philox(seed: int, name_key: int, purpose: int, number: int, block: int = 0) -> np.random.Generator:
    """A Philox generator for each key."""
    # Each part has its fixed number of 32-bit words: SeedSequence joins and pads, so others could meet.
    words = [seed & 0xFFFFFFFF, seed >> 32, name_key & 0xFFFFFFFF, name_key >> 32, purpose, number, block]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
