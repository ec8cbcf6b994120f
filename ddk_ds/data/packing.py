"""Pure decisions about token sequences: which documents are held out, and how documents become samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.unsignedinteger[Any]]
"""Token ids in the shards' dtype, uint16 or uint32."""


Keys = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """Which documents are held out: those whose key is under `key`, and of those that have it the first ones,
    up to document number `last`."""

    key: int
    last: int = -1

    def mask(self, keys: Keys, first: int) -> npt.NDArray[np.bool_]:
        """(n,) whether each document is held out.

        Args:
            keys: (n,) of consecutive documents.
            first: number of the first of them.
        """
        key = np.uint64(self.key)
        return np.asarray((keys < key) | ((keys == key) & (np.arange(first, first + len(keys)) <= self.last)))


def choose_validation(
    chunks: Iterable[tuple[Keys, Counts]], *, min_tokens: int | None = None, fraction: float | None = None
) -> HeldOut:
    """Choose the documents with the smallest keys, whatever their order; memory holds a chunk and the chosen ones.

    Args:
        chunks: keys (n,), a hash of each document's content, uniform over 64 bits; tokens (n,) of each document.
        min_tokens: take the smallest keys until this many tokens are held out, or all documents.
        fraction: or take keys under `fraction` of the range. Exactly one of the two is given.
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


def pack(documents: Iterable[Ids], sequence_length: int) -> Iterator[Ids]:
    """Cut the joined documents into samples of `sequence_length` ids; a tail that fills none is dropped."""
    buffer: list[Ids] = []
    buffered_tokens = 0
    for document in documents:
        buffer.append(document)
        buffered_tokens += len(document)
        if buffered_tokens < sequence_length:
            continue
        joined = np.concatenate(buffer)
        whole_tokens = buffered_tokens - buffered_tokens % sequence_length
        yield from joined[:whole_tokens].reshape(-1, sequence_length)
        buffer = [joined[whole_tokens:]]
        buffered_tokens -= whole_tokens
