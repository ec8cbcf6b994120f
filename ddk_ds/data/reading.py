"""A domain's ids on the disk while it is read, before the split is decided: they grow at the end, and can be cut back.

Two files: `<domain>.ids` holds all ids in a row, `<domain>.documents` a record of 24 bytes a document.

A domain's documents read, encoded and spooled, part by part; a killed preparation goes on at the last part's end.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddk_ds.data.documents import Dropped, Meter, Position, read_documents
from ddk_ds.data.mds import HeldOut, Ids
from ddk_ds.data.recipe import Domain, SourceFile
from ddk_ds.data.tokenizer import BatchEncoder
from ddk_ds.data.workdir import Reading, WorkDir

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


BATCH_BYTES = 1 << 19
PART_SECONDS = 15.0
Progress = Callable[[str, int, int], None]
"""Told a domain's name, how much of it is encoded, and how much it has: bytes on the disk, or of a capped
domain's text; an estimate where a store does not tell sizes."""


@dataclass(frozen=True)
class _Batch:
    """Some documents, and the reader's state after the last of them."""

    texts: list[str]
    digests: list[bytes]
    num_bytes: list[int]
    position: Position
    dropped: Dropped
    disk_bytes: int


@dataclass(frozen=True)
class DomainText:
    """One domain of a recipe: `number` is its place, `seed` keys the digests."""

    name: str
    number: int
    domain: Domain
    files: Sequence[SourceFile]
    seed: int

    def spool(self, work: WorkDir, dtype: str, encode: BatchEncoder, progress: Progress) -> tuple[Spool, Reading]:
        """Read and encode what is not yet in the domain's spool; returns it, complete and on the disk.

        Raises:
            DataError: text cannot be read.
            OSError: the disk is full.
        """
        reading = work.reading(self.name)
        spool = Spool(work.path, self.name, dtype, num_documents=reading.documents, num_tokens=reading.tokens)
        try:
            if not reading.done:
                self._read_on(work, spool, reading, encode, progress)
        except BaseException:
            spool.close()
            raise
        return spool, reading

    def _read_on(self, work: WorkDir, spool: Spool, reading: Reading, encode: BatchEncoder, progress: Progress) -> None:
        position, dropped = replace(reading.position), replace(reading.dropped)
        meter = Meter(sum(file.num_bytes for file in self.files[: position.file]))
        progress(self.name, *self._done(reading.position, meter.disk_bytes))
        last_commit = time.monotonic()
        for batch, (ids, lengths) in encode(self._batches(work, position, dropped, meter)):
            spool.append(ids, lengths, batch.digests, batch.num_bytes)
            work.keep(batch.digests)
            reading.position, reading.dropped = batch.position, batch.dropped
            if time.monotonic() - last_commit >= PART_SECONDS:
                self._commit(work, spool, reading)
                last_commit = time.monotonic()
            progress(self.name, *self._done(batch.position, batch.disk_bytes))
        reading.position, reading.dropped, reading.done = position, dropped, True
        self._commit(work, spool, reading)
        progress(self.name, *self._done(position, meter.disk_bytes))

    def _batches(self, work: WorkDir, position: Position, dropped: Dropped, meter: Meter) -> Iterator[_Batch]:
        """Batches of about BATCH_BYTES; `position` and `dropped` move."""

        def batch() -> _Batch:
            return _Batch(texts, digests, num_bytes, replace(position), replace(dropped), meter.disk_bytes)

        texts: list[str] = []
        digests: list[bytes] = []
        num_bytes: list[int] = []
        batch_bytes = 0
        documents = read_documents(
            self.domain,
            self.files,
            seed=self.seed,
            seen=work,
            dropped=dropped,
            position=position,
            meter=meter,
            scratch=work.scratch,
        )
        for document in documents:
            texts.append(document.text)
            digests.append(document.digest)
            num_bytes.append(document.num_bytes)
            batch_bytes += document.num_bytes
            if batch_bytes >= BATCH_BYTES:
                yield batch()
                texts, digests, num_bytes, batch_bytes = [], [], [], 0
        if texts:
            yield batch()

    def _commit(self, work: WorkDir, spool: Spool, reading: Reading) -> None:
        spool.sync()
        reading.documents, reading.tokens = spool.num_documents, spool.num_tokens
        work.commit(self.name, self.number, self.domain, self.files, reading)

    @cached_property
    def disk_bytes(self) -> int:
        """Size of all files, where it is known."""
        return sum(file.num_bytes for file in self.files)

    def _done(self, position: Position, disk_bytes: int) -> tuple[int, int]:
        """What is done and what there is to do."""
        total = max(self.disk_bytes, disk_bytes, 1)
        cap = self.domain.max_bytes
        if cap is None or cap >= total:
            return disk_bytes, total
        share = max(min(position.num_bytes / cap, 1.0), disk_bytes / total)
        return int(share * cap), cap
