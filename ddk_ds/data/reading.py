"""A domain's documents read, encoded and spooled, part by part; a killed preparation goes on at the last part's end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ddk_ds.data.documents import Dropped, Meter, Position, read_documents
from ddk_ds.data.encode import BatchEncoder
from ddk_ds.data.recipe import Domain, SourceFile
from ddk_ds.data.spool import Spool
from ddk_ds.data.workdir import Reading, WorkDir

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
