"""Documents that are encoded and on the disk: all of them, those of a split, or a stretch of a split's tokens.

They lie in pairs of files, in order: `<stem>.ids` holds the ids of some documents in a row, `<stem>.documents` a record
of 24 bytes for each. Those of conversations are three: `<stem>.targets` has a byte for each id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ddk_ds.data.held_out import Counts, HeldOut
from ddk_ds.data.mds import Ids

RECORD = np.dtype([("key", "<u8"), ("bytes", "<i8"), ("tokens", "<i8")])
"""A document: a hash of its content, the bytes of its text (UTF-8), and the number of its tokens."""
_RECORDS = 1 << 16
_IDS = 1 << 20


class Stretch(NamedTuple):
    """The tokens from `begin` up to `end` of a split.

    `starts` has for each pair of files the numbers of documents, and of the split's tokens, in the pairs before it.
    """

    begin: int
    end: int
    starts: Sequence[tuple[int, int]]


class Spooled:
    """The documents of some pairs of files, in order. The records and a little of the ids are in memory at a time.

    Attributes:
        stems: paths of the pairs, without the suffix.
        dtype: dtype of the ids.
    """

    def __init__(self, stems: Sequence[Path], dtype: str) -> None:
        """Store where the documents are; no file is opened."""
        self.stems = stems
        self.dtype = dtype

    def records(self) -> Iterator[tuple[int, npt.NDArray[np.void]]]:
        """Yield (number of the first document, chunk of records with the fields key, bytes, tokens)."""
        first = 0
        for stem in self.stems:
            for chunk in _chunks(stem):
                yield first, chunk
                first += len(chunk)

    def starts(self, held_out: HeldOut, *, validation: bool) -> list[tuple[int, int]]:
        """Return the starts of a split's stretches."""
        found, documents, tokens = [], 0, 0
        for stem in self.stems:
            found.append((documents, tokens))
            for chunk in _chunks(stem):
                tokens += int(chunk["tokens"][held_out.mask(chunk["key"], documents) == validation].sum())
                documents += len(chunk)
        return found

    def lengths(self, held_out: HeldOut, *, validation: bool, stretch: Stretch | None = None) -> Iterator[Counts]:
        """Yield the numbers of tokens of one split's documents, in order, in chunks of any size.

        Of a stretch they are the numbers of tokens inside it.
        """
        for _, begins, ends in self._chosen(held_out, validation, stretch):
            yield ends - begins

    def ids(self, held_out: HeldOut, *, validation: bool, stretch: Stretch | None = None) -> Iterator[Ids]:
        """Yield the ids of one split's documents, joined in order, in pieces of any size."""
        yield from self._values("ids", np.dtype(self.dtype), held_out, validation, stretch)

    def targets(self, held_out: HeldOut, *, validation: bool) -> Iterator[Ids]:
        """Yield 1 for each of the same ids that is a target, 0 for the others, as uint8."""
        yield from self._values("targets", np.dtype(np.uint8), held_out, validation, None)

    def _values(
        self, suffix: str, dtype: np.dtype[Any], held_out: HeldOut, validation: bool, stretch: Stretch | None
    ) -> Iterator[Any]:
        for stem, begins, ends in self._chosen(held_out, validation, stretch):
            with Path(f"{stem}.{suffix}").open("rb") as stream:
                gaps = np.flatnonzero(begins[1:] != ends[:-1]) + 1
                for first, last in zip([0, *gaps], [*gaps - 1, len(begins) - 1], strict=True):
                    start, end = int(begins[first]), int(ends[last])
                    stream.seek(start * dtype.itemsize)
                    while start < end:
                        piece = np.fromfile(stream, dtype, min(_IDS, end - start))
                        start += len(piece)
                        yield piece

    def _chosen(
        self, held_out: HeldOut, validation: bool, stretch: Stretch | None
    ) -> Iterator[tuple[Path, Counts, Counts]]:
        """Yield (stem, begins (n,), ends (n,)): the places in a file of the documents of a split or a stretch."""
        documents = tokens = 0
        for number, stem in enumerate(self.stems):
            if stretch is not None:
                documents, tokens = stretch.starts[number]
                if tokens >= stretch.end:
                    return
                if number + 1 < len(self.stems) and stretch.starts[number + 1][1] <= stretch.begin:
                    continue
            start = 0
            for chunk in _chunks(stem):
                ends = start + np.cumsum(chunk["tokens"])
                chosen = held_out.mask(chunk["key"], documents) == validation
                begins, start = (ends - chunk["tokens"])[chosen], int(ends[-1])
                ends = ends[chosen]
                documents += len(chunk)
                if stretch is not None:
                    places = tokens + np.cumsum(ends - begins)  # of the documents' ends in the split
                    tokens += int((ends - begins).sum())
                    before, after = stretch.begin - places + ends - begins, places - stretch.end
                    begins, ends = begins + np.maximum(before, 0), ends - np.maximum(after, 0)
                    begins, ends = begins[begins < ends], ends[begins < ends]
                if len(begins):
                    yield stem, begins, ends


def _chunks(stem: Path) -> Iterator[npt.NDArray[np.void]]:
    with Path(f"{stem}.documents").open("rb") as stream:
        while len(chunk := np.fromfile(stream, RECORD, _RECORDS)):
            yield chunk
