"""The order in which one domain's samples are drawn: an endless sequence of shard-aware permutations.

It depends only on the seed, the domain's name and its shards: another domain or other proportions do not change it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ddk_ds.errors import ConfigError, DataError

Ids = NDArray[np.int64]

BLOCK_SAMPLES = 65536
SHARDS, SAMPLES, MIX = range(3)  # purposes of the random streams


class DomainOrder:
    """The endless sequence of one domain's draws; each pass is a permutation of all its samples.

    Every pass permutes the shards, cuts them into blocks of at least `block` samples, and permutes the samples inside
    each block. take(a, b) costs O(b - a + block). At any draw, the shards of at most two blocks are in use: this bounds
    the size of a cache.
    """

    def __init__(self, name: str, shard_sizes: Sequence[int] | Ids, seed: int, block: int = BLOCK_SAMPLES) -> None:
        """Prepare the sequence; nothing is drawn yet.

        Args:
            shard_sizes: number of samples of each shard.
            block: number of samples, >= 1.

        Raises:
            DataError: the domain has no samples, or a shard has a negative number of samples.
            ConfigError: seed or block is out of range.
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
        """Return the sample ids (stop - start,) of draws start..stop-1, numbered within the domain.

        Draw 0 is the domain's first draw of the run. A draw after the end of a pass belongs to the next pass.
        """
        assert 0 <= start <= stop, f"draws {start}..{stop} of domain '{self.name}'"
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            pass_number, first = divmod(start, self.num_samples)
            last = min(self.num_samples, first + stop - start)
            parts.append(self._take_in_pass(pass_number, first, last))
            start += last - first
        return np.concatenate(parts)

    def shards_of(self, start: int, stop: int) -> Ids:
        """Return the indices of the shards that draws start..stop-1 read, each once, in the order of first use."""
        shards = np.searchsorted(self._offsets, self.take(start, stop), "right") - 1
        _, first_use = np.unique(shards, return_index=True)
        by_first_use: Ids = shards[np.sort(first_use)]
        return by_first_use

    def _take_in_pass(self, pass_number: int, first: int, last: int) -> Ids:
        ends, groups = self._blocks(pass_number)
        parts = []
        first_block, last_block = np.searchsorted(ends, [first, last - 1], "right").tolist()
        for k in range(first_block, last_block + 1):
            sizes = self.shard_sizes[groups[k]]
            begins = np.cumsum(sizes) - sizes  # first draw of each shard in the block
            ids = np.repeat(self._offsets[groups[k]] - begins, sizes) + np.arange(sizes.sum())
            begin = int(ends[k]) - len(ids)
            ids = philox(self.seed, name_key(self.name), SAMPLES, pass_number, k).permutation(ids)
            parts.append(ids[max(0, first - begin) : last - begin])
        return np.concatenate(parts)

    def _blocks(self, pass_number: int) -> tuple[Ids, list[Ids]]:
        """Return for each block of the pass the number of draws up to its end, and the indices of its shards."""
        if self._pass is None or self._pass[0] != pass_number:
            generator = philox(self.seed, name_key(self.name), SHARDS, pass_number)
            shards = generator.permutation(np.flatnonzero(self.shard_sizes))
            ends = np.cumsum(self.shard_sizes[shards])
            cuts = [0]
            while cuts[-1] < len(shards):
                filled = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
                cuts.append(min(int(np.searchsorted(ends, filled + self.block)) + 1, len(shards)))
            groups = [shards[a:b] for a, b in itertools.pairwise(cuts)]
            self._pass = (pass_number, ends[np.array(cuts[1:]) - 1], groups)
        return self._pass[1], self._pass[2]


def check_seed(seed: int, block: int) -> None:
    """Raise ConfigError if seed or block is out of range."""
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"seed is {seed}: give an integer from 0 to 2^64 - 1")
    if block < 1:
        raise ConfigError(f"block is {block} samples: give 1 or more")


def name_key(name: str) -> int:
    """Return 64 bits that stand for a domain's name."""
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=8).digest(), "big")


def philox(seed: int, name_key: int, purpose: int, number: int, block: int = 0) -> np.random.Generator:
    """Return a random generator whose stream depends on these five values alone."""
    # SeedSequence joins and pads its words: with a fixed number of 32-bit words for each value, no two keys are equal.
    words = [seed & 0xFFFFFFFF, seed >> 32, name_key & 0xFFFFFFFF, name_key >> 32, purpose, number, block]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
