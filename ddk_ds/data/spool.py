"""A domain's ids on the disk while it is read, before the split is decided: they grow at the end, and can be cut back.

Two files: `<domain>.ids` holds all ids in a row, `<domain>.documents` a record of 24 bytes a document.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddk_ds.data.packing import HeldOut, Ids

_RECORD = np.dtype([("key", "<u8"), ("bytes", "<i8"), ("tokens", "<i8")])
_RECORDS = 1 << 16
_IDS = 1 << 20


class Spool:
    """The ids of one domain's documents.

    Attributes:
        dtype: of the ids.
        num_documents, num_tokens: what it holds.
    """

    def __init__(self, directory: Path, name: str, dtype: str, *, num_documents: int = 0, num_tokens: int = 0) -> None:
        """Open or make the files, and cut what lies behind the given documents and tokens."""
        self.dtype = dtype
        self._dtype = np.dtype(dtype)
        self._paths = directory / f"{name}.ids", directory / f"{name}.documents"
        self.num_documents, self.num_tokens = num_documents, num_tokens
        sizes = num_tokens * self._dtype.itemsize, num_documents * _RECORD.itemsize
        self._streams = [path.open("ab") for path in self._paths]
        for stream, size in zip(self._streams, sizes, strict=True):
            stream.truncate(size)

    def append(
        self, ids: Ids, lengths: npt.NDArray[np.int64], digests: Sequence[bytes], num_bytes: Sequence[int]
    ) -> None:
        """Add documents: their ids in a row, and of each its number of ids, digest, and bytes of text."""
        records = np.empty(len(lengths), _RECORD)
        # The first 8 of a digest's 16 bytes: enough to rank by.
        records["key"] = np.frombuffer(b"".join(digests), ">u8")[::2]
        records["bytes"] = num_bytes
        records["tokens"] = lengths
        self._streams[0].write(ids.data)
        self._streams[1].write(records.data)
        self.num_documents += len(lengths)
        self.num_tokens += len(ids)

    def sync(self) -> None:
        """Bring everything to the disk."""
        for stream in self._streams:
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Close the files; what was not synchronised may be lost, on a full disk too."""
        for stream in self._streams:
            try:
                stream.close()
            except OSError:
                stream.raw.close()

    def remove(self) -> None:
        """Delete the files."""
        self.close()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def records(self) -> Iterator[tuple[int, npt.NDArray[np.void]]]:
        """(number of the first, a chunk of records with the fields key, bytes, tokens), over all documents."""
        with self._paths[1].open("rb") as stream:
            first = 0
            while len(chunk := np.fromfile(stream, _RECORD, _RECORDS)):
                yield first, chunk
                first += len(chunk)

    def ids(self, held_out: HeldOut, *, validation: bool) -> Iterator[Ids]:
        """The ids of one split's documents, joined in order, in pieces of any size."""
        with self._paths[0].open("rb") as stream:
            start = 0
            for first, chunk in self.records():
                ends = start + np.cumsum(chunk["tokens"])
                chosen = held_out.mask(chunk["key"], first) == validation
                changes = np.flatnonzero(np.diff(chosen)) + 1
                for begin, end in zip([0, *changes], [*changes, len(chunk)], strict=True):
                    if chosen[begin]:
                        yield from self._piece(stream, int(ends[begin - 1]) if begin else start, int(ends[end - 1]))
                start = int(ends[-1])

    def _piece(self, stream: io.BufferedReader, start: int, end: int) -> Iterator[Ids]:
        stream.seek(start * self._dtype.itemsize)
        while start < end:
            ids = np.fromfile(stream, self._dtype, min(_IDS, end - start))
            start += len(ids)
            yield ids
