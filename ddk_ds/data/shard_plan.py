"""Which samples lie in which shard, from the numbers of tokens of the documents alone: no token is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ddk_ds.data.mds import Lengths, packed_lengths, sample_record, split_writer

if TYPE_CHECKING:
    from streaming import MDSWriter


def shard_samples(lengths: Iterable[Lengths], *, sequence_length: int, dtype: str, shard_bytes: int) -> Iterator[int]:
    """Yield the number of samples in each shard that `write_split` makes of documents that are joined and cut.

    Args:
        lengths: the documents' numbers of tokens, in chunks of any size.
    """
    counts = (of_samples for _, of_samples in packed_lengths(lengths, sequence_length))
    yield from shards_of(counts, sequence_length=sequence_length, dtype=dtype, shard_bytes=shard_bytes)


def shards_of(
    counts: Iterable[npt.NDArray[np.integer[Any]]],
    *,
    sequence_length: int,
    dtype: str,
    shard_bytes: int,
    borders: bool = True,
) -> Iterator[int]:
    """Yield the number of samples in each shard that `write_split` makes of samples with so many documents each.

    Args:
        counts: the samples' numbers of documents, in chunks of any size.
        borders: False if the samples have no borders of documents.
    """
    with TemporaryDirectory() as directory:
        writer = split_writer(Path(directory) / "none", sequence_length, dtype, shard_bytes, borders=borders)
        space = shard_bytes - writer.extra_bytes_per_shard
        rest = np.zeros(0, np.int64)
        known: dict[int, int] = {}
        for of_samples in counts:
            distinct, places = np.unique(of_samples, return_inverse=True)
            for count in distinct.tolist():
                if count not in known:
                    known[count] = _sample_bytes(writer, sequence_length, dtype, count if borders else None)
            sizes = np.concatenate([rest, np.array([known[count] for count in distinct.tolist()], np.int64)[places]])
            full = list(_full(sizes, space))
            yield from full
            rest = sizes[sum(full) :]
        if len(rest):
            yield len(rest)


def _sample_bytes(writer: MDSWriter, sequence_length: int, dtype: str, documents: int | None) -> int:
    """Return the bytes that a sample of so many documents, or one without borders, takes in a shard."""
    lengths = None if documents is None else np.zeros(documents, np.uint32)
    sample = sample_record(np.zeros(sequence_length, dtype), lengths)
    return len(writer.encode_sample(sample)) + writer.extra_bytes_per_sample


def _full(sizes: npt.NDArray[np.int64], space: int) -> Iterator[int]:
    """Yield the number of samples of each shard that the next sample does not fit into."""
    ends = np.cumsum(sizes)
    begin, used = 0, 0
    while (end := int(np.searchsorted(ends, used + space, side="right"))) < len(ends):
        yield end - begin
        begin, used = end, int(ends[end - 1])
