"""Pure decisions about token sequences: which documents are held out, and how documents become samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.unsignedinteger[Any]]
"""Token ids in the shards' dtype, uint16 or uint32."""


def choose_validation(
    keys: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.int64],
    *,
    min_tokens: int | None = None,
    fraction: float | None = None,
) -> npt.NDArray[np.bool_]:
    """Which documents are held out: those whose key is under a threshold, whatever their order.

    Args:
        keys: (n,) a hash of each document's content, uniform over 64 bits.
        lengths: (n,) tokens of each document.
        min_tokens: take the smallest keys until this many tokens are held out, or all documents.
        fraction: or take keys under `fraction` of the range. Exactly one of the two is given.

    Returns:
        (n,) bool
    """
    assert (min_tokens is None) != (fraction is None), "exactly one of min_tokens and fraction"
    if fraction is not None:
        return np.asarray(keys.astype(np.float64) < fraction * 2.0**64)
    order = np.argsort(keys, kind="stable")
    before = np.cumsum(lengths[order]) - lengths[order]
    held_out = np.zeros(len(keys), np.bool_)
    held_out[order] = before < min_tokens
    return held_out


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
