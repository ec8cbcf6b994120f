"""Which documents are held out for validation: those with the smallest keys, in any order of the documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """The documents that are held out for validation.

    They are the documents with a key less than `key`, and those with exactly that key up to document number `last`.
    """

    key: int
    last: int = -1

    def mask(self, keys: Keys, first: int) -> npt.NDArray[np.bool_]:
        """Return (n,) bool: True for each document that is held out.

        Args:
            keys: (n,) keys of consecutive documents.
            first: number of the first of these documents.
        """
        key = np.uint64(self.key)
        return np.asarray((keys < key) | ((keys == key) & (np.arange(first, first + len(keys)) <= self.last)))


def choose_validation(
    chunks: Iterable[tuple[Keys, Counts]], *, min_tokens: int | None = None, fraction: float | None = None
) -> HeldOut:
    """Choose the documents with the smallest keys for validation. Memory holds one chunk and the keys of the chosen.

    Args:
        chunks: pairs of keys (n,), a hash of each document's content that is uniform over 64 bits, and tokens (n,),
            the number of tokens of each document.
        min_tokens: hold out documents by ascending key until they have this many tokens, or all documents.
        fraction: hold out the keys in this share of the range. Exactly one of the two is given.
    """
    assert (min_tokens is None) != (fraction is None), "exactly one of min_tokens and fraction"
    if fraction is not None:
        return HeldOut(int(fraction * 2.0**64))
    first = 0
    keys, numbers, lengths = np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    for new_keys, new_lengths in chunks:
        keys = np.concatenate([keys, new_keys])
        numbers = np.concatenate([numbers, np.arange(first, first + len(new_keys))])
        lengths = np.concatenate([lengths, new_lengths])
        order = np.argsort(keys, kind="stable")
        before = np.cumsum(lengths[order]) - lengths[order]
        kept = order[before < min_tokens]
        keys, numbers, lengths = keys[kept], numbers[kept], lengths[kept]
        first += len(new_keys)
    return HeldOut(int(keys[-1]), int(numbers[-1])) if len(keys) else HeldOut(0)
