"""A domain's documents are read, encoded and spooled to the disk part by part; then the held-out ones are chosen.

A killed preparation continues after its last finished part: what the spool holds beyond that part is cut off. A spool
is two files: `<domain>.ids` holds all ids in a row, `<domain>.documents` a record of 24 bytes for each document.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddk_ds.data.documents import Dropped, Meter, Position, read_documents
from ddk_ds.data.encoding import BatchEncoder
from ddk_ds.data.long_documents import DocumentCutter, Part
from ddk_ds.data.mds import Ids
from ddk_ds.data.recipe import Domain, SourceFile
from ddk_ds.data.workdir import Reading, WorkDir

BATCH_BYTES = 1 << 19
PART_SECONDS = 15.0
Progress = Callable[[str, int, int], None]
"""Called with a domain's name, how much of the domain is encoded, and how much it has: bytes on the disk, or bytes of a
capped domain's text. How much it has is an estimate where a store does not know the sizes of its files."""
Keys = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]
_RECORD = np.dtype([("key", "<u8"), ("bytes", "<i8"), ("tokens", "<i8")])
_RECORDS = 1 << 16
_IDS = 1 << 20


@dataclass(frozen=True)
class _Batch:
    """Parts that are encoded together, digests and sizes of the documents that end here, and the reader's state."""

    parts: list[Part]
    digests: list[bytes]
    num_bytes: list[int]
    position: Position
    dropped: Dropped
    disk_bytes: int


@dataclass(frozen=True)
class DomainText:
    """The text of one domain of a recipe: `number` is its place in the recipe, `seed` keys the digests."""

    name: str
    number: int
    domain: Domain
    files: Sequence[SourceFile]
    seed: int
    cutter: DocumentCutter

    def spool(self, work: WorkDir, dtype: str, encode: BatchEncoder, progress: Progress) -> tuple[Spool, Reading]:
        """Read and encode the documents that the spool lacks; return the complete spool and the state of the reading.

        The spool's data are on the disk when this returns.

        Raises:
            DataError: text cannot be read.
            OSError: the disk is full.
        """
        reading = work.reading(self.name)
        spool = Spool(work.path, self.name, dtype, num_documents=reading.documents, num_tokens=reading.tokens)
        try:
            if not reading.done:
                self._read_new(work, spool, reading, encode, progress)
        except BaseException:
            spool.close()
            raise
        return spool, reading

    def _read_new(
        self, work: WorkDir, spool: Spool, reading: Reading, encode: BatchEncoder, progress: Progress
    ) -> None:
        position, dropped = replace(reading.position), replace(reading.dropped)
        meter = Meter(sum(file.num_bytes for file in self.files[: position.file]))
        progress(self.name, *self._progress(reading.position, meter.disk_bytes))
        last_commit = time.monotonic()
        for batch, encoded in encode(self._batches(work, position, dropped, meter)):
            closes = np.array([part.closes for part in batch.parts])
            spool.append(encoded.ids, encoded.lengths, closes, batch.digests, batch.num_bytes)
            work.keep(batch.digests)
            reading.control_tokens += encoded.control_tokens
            # Between two parts of a document there is no place to continue at.
            if closes[-1]:
                reading.position, reading.dropped = batch.position, batch.dropped
                if time.monotonic() - last_commit >= PART_SECONDS:
                    self._commit(work, spool, reading)
                    last_commit = time.monotonic()
            progress(self.name, *self._progress(batch.position, batch.disk_bytes))
        reading.position, reading.dropped, reading.done = position, dropped, True
        self._commit(work, spool, reading)
        progress(self.name, *self._progress(position, meter.disk_bytes))

    def _batches(self, work: WorkDir, position: Position, dropped: Dropped, meter: Meter) -> Iterator[_Batch]:
        """Yield batches of about BATCH_BYTES, keeping `position` and `dropped` up to date."""

        def batch() -> _Batch:
            return _Batch(parts, digests, num_bytes, replace(position), replace(dropped), meter.disk_bytes)

        parts: list[Part] = []
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
            for part in self.cutter.parts(document.text, dropped):
                parts.append(part)
                batch_bytes += document.num_bytes if part.opens and part.closes else len(part.text)
                if part.closes:
                    digests.append(document.digest)
                    num_bytes.append(document.num_bytes)
                if batch_bytes >= BATCH_BYTES:
                    yield batch()
                    parts, digests, num_bytes, batch_bytes = [], [], [], 0
        if parts:
            yield batch()

    def _commit(self, work: WorkDir, spool: Spool, reading: Reading) -> None:
        spool.sync()
        reading.documents, reading.tokens = spool.num_documents, spool.num_tokens
        work.commit(self.name, self.number, self.domain, self.files, reading)

    @cached_property
    def disk_bytes(self) -> int:
        """Size of all the domain's files in bytes, compressed as they are stored; files of unknown size count as 0."""
        return sum(file.num_bytes for file in self.files)

    def _progress(self, position: Position, disk_bytes: int) -> tuple[int, int]:
        """Return how much is encoded and how much there is, as `Progress` takes them."""
        total = max(self.disk_bytes, disk_bytes, 1)
        cap = self.domain.max_bytes
        if cap is None or cap >= total:
            return disk_bytes, total
        share = max(min(position.num_bytes / cap, 1.0), disk_bytes / total)
        return int(share * cap), cap


class Spool:
    """The ids of one domain's documents on the disk.

    Attributes:
        dtype: dtype of the ids.
        num_documents, num_tokens: number of documents and of tokens in the spool.
    """

    def __init__(self, directory: Path, name: str, dtype: str, *, num_documents: int = 0, num_tokens: int = 0) -> None:
        """Open or create both files; truncate them to their first `num_documents` documents and `num_tokens` tokens."""
        self.dtype = dtype
        self._dtype = np.dtype(dtype)
        self._paths = directory / f"{name}.ids", directory / f"{name}.documents"
        self.num_documents, self.num_tokens = num_documents, num_tokens
        self._open_tokens = 0
        sizes = num_tokens * self._dtype.itemsize, num_documents * _RECORD.itemsize
        self._streams = [path.open("ab") for path in self._paths]
        for stream, size in zip(self._streams, sizes, strict=True):
            stream.truncate(size)

    def append(
        self,
        ids: Ids,
        lengths: npt.NDArray[np.int64],
        closes: npt.NDArray[np.bool_],
        digests: Sequence[bytes],
        num_bytes: Sequence[int],
    ) -> None:
        """Add parts of documents: their ids in a row, the number of ids of each, and True for those that end one.

        `digests` and `num_bytes` are of the documents that end here. The next call goes on with a document that does
        not.
        """
        ends = np.cumsum(lengths)[closes]
        records = np.empty(len(ends), _RECORD)
        # The first 8 of a digest's 16 bytes are enough to rank by.
        records["key"] = np.frombuffer(b"".join(digests), ">u8")[::2]
        records["bytes"] = num_bytes
        records["tokens"] = np.diff(ends, prepend=-self._open_tokens)
        self._open_tokens = len(ids) - int(ends[-1]) if len(ends) else self._open_tokens + len(ids)
        self._streams[0].write(ids.data)
        self._streams[1].write(records.data)
        self.num_documents += len(ends)
        self.num_tokens += len(ids)

    def sync(self) -> None:
        """Write everything to the disk, by fsync."""
        for stream in self._streams:
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Close both files. Documents added since the last `sync` can be lost; a full disk raises no error."""
        for stream in self._streams:
            try:
                stream.close()
            except OSError:
                stream.raw.close()

    def remove(self) -> None:
        """Close and delete both files."""
        self.close()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def records(self) -> Iterator[tuple[int, npt.NDArray[np.void]]]:
        """Yield (number of the first document, chunk of records with the fields key, bytes, tokens)."""
        with self._paths[1].open("rb") as stream:
            first = 0
            while len(chunk := np.fromfile(stream, _RECORD, _RECORDS)):
                yield first, chunk
                first += len(chunk)

    def lengths(self, held_out: HeldOut, *, validation: bool) -> Iterator[Counts]:
        """Yield the numbers of tokens of one split's documents, in order, in chunks of any size."""
        for first, chunk in self.records():
            yield chunk["tokens"][held_out.mask(chunk["key"], first) == validation]

    def ids(self, held_out: HeldOut, *, validation: bool) -> Iterator[Ids]:
        """Yield the ids of one split's documents, joined in order, in pieces of any size."""
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
