"""Best-fit packing (arXiv 2404.10830): documents are cut only where they are longer than a sample, and samples padded.

A longer document gives full samples and a remainder. Remainders and other documents are packed by best-fit decreasing:
each, the longest first, goes to the sample with the least space that takes it. That is done for some documents at a
time, since their ids are in memory then, and in an order of its own: the samples are put in that of their first
documents.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from ddk_ds.data.mds import Ids, Lengths, Packed

WINDOW_TOKENS = 1 << 24
"""Tokens of the documents that are packed together, or those of one document if it has more: 2^24 are 8,192 samples of
2,048, and about 100 MB of memory with 16 bits a token."""


def pack_best_fit(
    ids: Iterable[Ids], lengths: Iterable[Lengths], sequence_length: int, padding: int, window: int = WINDOW_TOKENS
) -> Iterator[Packed]:
    """Yield samples of `sequence_length` ids with the lengths of their documents.

    What is left of a sample has the id `padding`, each as a document of one token: so it has no label, and nothing sees
    it.

    Args:
        ids: those of the documents, joined, in pieces of any size.
        lengths: those of the documents, in chunks of any size.
        window: tokens of the documents that are packed together.
    """
    for tokens, of_window in _windows(ids, lengths, window):
        begins, parts = _parts(of_window, sequence_length)
        for chosen in best_fit(parts, sequence_length):
            packed = [tokens[begins[part] : begins[part] + parts[part]] for part in chosen]
            left = sequence_length - int(parts[chosen].sum())
            sample = np.concatenate([*packed, np.full(left, padding, tokens.dtype)])
            yield Packed(sample, np.concatenate([parts[chosen], np.ones(left, np.int64)]))


def best_fit(lengths: Lengths, space: int) -> list[list[int]]:
    """Return the numbers of the items (n,) in each bin of `space`, which none is longer than, by best-fit decreasing.

    Of equal items the first one goes first, and of equal bins the one that was used last. Items of a bin are in order,
    and so are bins, by their first items.
    """
    bins: list[list[int]] = []
    spaces: list[int] = []  # of bins that are not full, each once, in order
    with_space: dict[int, list[int]] = {}
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        place = bisect_left(spaces, length)
        if place == len(spaces):
            left, number = space - length, len(bins)
            bins.append([item])
        else:
            number = with_space[spaces[place]].pop()
            left = spaces[place] - length
            bins[number].append(item)
            if not with_space[spaces[place]]:
                del spaces[place]
        if left:
            if not with_space.get(left):
                insort(spaces, left)
            with_space.setdefault(left, []).append(number)
    return sorted(map(sorted, bins))


def _parts(lengths: Lengths, most: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return begins and lengths (m,) of the parts, of at most `most` tokens, of documents of these lengths (n,)."""
    counts = -(-lengths // most)
    begins = np.repeat(np.cumsum(lengths) - lengths, counts)
    begins += most * (np.arange(len(begins)) - np.repeat(np.cumsum(counts) - counts, counts))
    return begins, np.diff(begins, append=lengths.sum())


def _windows(ids: Iterable[Ids], lengths: Iterable[Lengths], least: int) -> Iterator[tuple[Ids, npt.NDArray[np.int64]]]:
    """Yield (ids, lengths) of documents that have `least` tokens together, or fewer at the end."""
    pieces, rest = iter(ids), list[Ids]()
    for of_window in _groups(lengths, least):
        total, have = int(of_window.sum()), sum(map(len, rest))
        while have < total:
            rest.append(next(pieces))
            have += len(rest[-1])
        joined = np.concatenate(rest)
        yield joined[:total], of_window
        rest = [joined[total:].copy()]  # the rest of one array would keep all of it


def _groups(lengths: Iterable[Lengths], least: int) -> Iterator[npt.NDArray[np.int64]]:
    waiting = np.zeros(0, np.int64)
    for chunk in lengths:
        waiting = np.concatenate([waiting, chunk.astype(np.int64)])
        ends = np.cumsum(waiting)
        while len(ends) and ends[-1] >= least:
            count = int(np.searchsorted(ends, least)) + 1
            yield waiting[:count]
            waiting = waiting[count:]
            ends = np.cumsum(waiting)
    if len(waiting):
        yield waiting
