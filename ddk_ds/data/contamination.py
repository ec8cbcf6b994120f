"""Texts of benchmarks in training data, found by n-grams of words (Brown et al., 2020, Appendix C).

A document that has an n-gram in common with a benchmark is taken for contaminated. N is a benchmark's own: the number
of words of its text at the 5th percentile, at least 8, since fewer words are shared by chance, and at most 13.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from ddk_ds.data.near_duplicates import require_datatrove, words_of

_FEWEST, _MOST = 8, 13
_PERCENTILE = 5
_PIECE_CHARS = 1 << 18
# An n-gram that begins in a piece ends in it: longer ones are no words of a benchmark.
_OVERLAP_CHARS = 1 << 10


class Contamination:
    """A function from texts to the benchmarks that are in them; it depends on text and benchmarks alone.

    Attributes:
        sizes: N of each benchmark, by name.
        too_short: number of its texts that have fewer words, and are not looked for.
    """

    def __init__(self, benchmarks: Mapping[str, Sequence[str]]) -> None:
        """Store the n-grams of the texts of each benchmark; one that two have belongs to the first."""
        require_datatrove("decontaminate")
        self.names = list(benchmarks)
        self.sizes: dict[str, int] = {}
        self.too_short: dict[str, int] = {}
        found: dict[int, list[tuple[npt.NDArray[np.uint64], int]]] = {}
        for number, (name, texts) in enumerate(benchmarks.items()):
            words = [words_of(text) for text in texts]
            shortest = np.percentile([len(of_text) for of_text in words], _PERCENTILE)
            size = self.sizes[name] = int(np.clip(shortest, _FEWEST, _MOST))
            self.too_short[name] = sum(len(of_text) < size for of_text in words)
            hashes = np.fromiter((gram for of_text in words for gram in _hashes(of_text, size)), np.uint64)
            found.setdefault(size, []).append((hashes, number))
        self._index: dict[int, tuple[npt.NDArray[np.uint64], npt.NDArray[np.int16]]] = {}
        for size, parts in found.items():
            hashes, first = np.unique(np.concatenate([part for part, _ in parts]), return_index=True)
            owners = np.concatenate([np.full(len(part), number, np.int16) for part, number in parts])
            if len(hashes):
                self._index[size] = hashes, owners[first]

    @property
    def fingerprint(self) -> str:
        """Return a hash of all n-grams and of the benchmarks' names."""
        digest = xxhash.xxh3_128(repr(self.sizes).encode())
        for size in sorted(self._index):
            digest.update(self._index[size][0].tobytes() + self._index[size][1].tobytes())
        return digest.hexdigest()

    def __call__(self, texts: Iterable[str]) -> list[str]:
        """Return the name of the first benchmark that each text has an n-gram of, or "" if there is none."""
        return [self._benchmark(text) for text in texts]

    def _benchmark(self, text: str) -> str:
        owners = set()
        for begin in range(0, len(text), _PIECE_CHARS):
            words = words_of(text[begin : begin + _PIECE_CHARS + _OVERLAP_CHARS])
            for size, (known, owner) in self._index.items():
                hashes = np.fromiter(_hashes(words, size), np.uint64)
                places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
                owners.update(owner[places[known[places] == hashes]].tolist())
        return self.names[min(owners)] if owners else ""


def _hashes(words: Sequence[str], size: int) -> Iterator[int]:
    return (xxhash.xxh3_64_intdigest(" ".join(words[begin : begin + size])) for begin in range(len(words) - size + 1))
