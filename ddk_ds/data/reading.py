"""A domain's documents are read, encoded and spooled to the disk part by part; then the held-out ones are chosen.

A killed preparation continues after its last finished part: what the spool holds beyond that part is cut off. A spool
is a pair of files (spooled.py), and of conversations three.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddk_ds.data.chat_encoding import ChatStyle, Conversations
from ddk_ds.data.conversations import plain_text
from ddk_ds.data.documents import Dropped, Meter, Position, Seen, read_documents
from ddk_ds.data.encoding import BatchEncoder, Encoded
from ddk_ds.data.long_documents import DocumentCutter, Part
from ddk_ds.data.mds import Ids, Targets
from ddk_ds.data.recipe import Domain, SourceFile
from ddk_ds.data.screening import Marks
from ddk_ds.data.spooled import RECORD, Spooled
from ddk_ds.data.workdir import Reading, WorkDir

BATCH_BYTES = 1 << 19
PART_SECONDS = 15.0
Progress = Callable[[str, int, int], None]
"""Called with a domain's name, how much of the domain is encoded, and how much it has: bytes on the disk, or bytes of a
capped domain's text. How much it has is an estimate where a store does not know the sizes of its files."""


@dataclass(frozen=True)
class TextBatch:
    """Parts that are encoded together, digests, sizes and texts of the documents that end here, and the reader's state.

    `texts` is empty if the documents are not screened.
    """

    parts: list[Part]
    texts: list[str]
    digests: list[bytes]
    num_bytes: list[int]
    position: Position
    dropped: Dropped
    disk_bytes: int


@dataclass(frozen=True)
class DomainText:
    """The text of one domain of a recipe: `number` is its place in the recipe, `seed` keys the digests.

    With `screened`, documents that are near an earlier one, or have text of a benchmark, are dropped.
    It is conversations of `style`; None: text.
    """

    name: str
    number: int
    domain: Domain
    files: Sequence[SourceFile]
    seed: int
    cutter: DocumentCutter
    screened: bool = False
    style: ChatStyle | None = None

    def spool(self, work: WorkDir, dtype: str, encode: BatchEncoder, progress: Progress) -> tuple[Spool, Reading]:
        """Read and encode the documents that the spool lacks; return the complete spool and the state of the reading.

        The spool's data are on the disk when this returns.

        Raises:
            DataError: text cannot be read.
            OSError: the disk is full.
        """
        reading = work.reading(self.name)
        spool = Spool(
            work.path,
            self.name,
            dtype,
            num_documents=reading.documents,
            num_tokens=reading.tokens,
            has_targets=self.style is not None,
        )
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
        for batch, encoded, marks in encode(self.batches(work, work.scratch, position, dropped, meter), self.style):
            if encoded.conversations is not None:
                marks = _of_kept(marks, encoded.conversations.kept)
                _count_dropped(reading, encoded.conversations)
            spool.append_batch(batch, encoded, _kept(work, reading, marks) if self.screened else None)
            work.keep(batch.digests)
            reading.control_tokens += encoded.control_tokens
            # Between two parts of a document there is no place to continue at.
            if batch.parts[-1].closes:
                reading.position, reading.dropped = batch.position, batch.dropped
                if time.monotonic() - last_commit >= PART_SECONDS:
                    self._commit(work, spool, reading)
                    last_commit = time.monotonic()
            progress(self.name, *self._progress(batch.position, batch.disk_bytes))
        reading.position, reading.dropped, reading.done = position, dropped, True
        self._commit(work, spool, reading)
        progress(self.name, *self._progress(position, meter.disk_bytes))

    def batches(
        self, seen: Seen, scratch: Path, position: Position, dropped: Dropped, meter: Meter
    ) -> Iterator[TextBatch]:
        """Yield batches of about BATCH_BYTES, keeping `position` and `dropped` up to date; see `read_documents`."""

        def batch() -> TextBatch:
            return TextBatch(parts, texts, digests, num_bytes, replace(position), replace(dropped), meter.disk_bytes)

        parts: list[Part] = []
        texts: list[str] = []
        digests: list[bytes] = []
        num_bytes: list[int] = []
        batch_bytes = 0
        documents = read_documents(
            self.domain,
            self.files,
            seed=self.seed,
            seen=seen,
            dropped=dropped,
            position=position,
            meter=meter,
            scratch=scratch,
        )
        for document in documents:
            whole = self.style is not None
            for part in [Part(document.text)] if whole else self.cutter.parts(document.text, dropped):
                parts.append(part)
                batch_bytes += document.num_bytes if part.opens and part.closes else len(part.text)
                if part.closes:
                    digests.append(document.digest)
                    num_bytes.append(document.num_bytes)
                    texts += [plain_text(document.text) if whole else document.text] * self.screened
                if batch_bytes >= BATCH_BYTES:
                    yield batch()
                    parts, texts, digests, num_bytes, batch_bytes = [], [], [], [], 0
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


def _kept(work: WorkDir, reading: Reading, marks: Marks) -> npt.NDArray[np.bool_]:
    """Return True for each document that is kept; `reading` counts the others."""
    kept = []
    for keys, benchmark in zip(*marks, strict=True):
        near = not benchmark and bool(keys) and work.is_near(keys)
        if benchmark:
            reading.contaminated[benchmark] = reading.contaminated.get(benchmark, 0) + 1
        reading.near_duplicates += near
        kept.append(not benchmark and not near)
    return np.array(kept, bool)


def _of_kept(marks: Marks, kept: npt.NDArray[np.bool_]) -> Marks:
    """Return the marks of the conversations that are kept."""
    places = np.flatnonzero(kept).tolist() if marks.keys else []
    return Marks([marks.keys[place] for place in places], [marks.benchmarks[place] for place in places])


def _count_dropped(reading: Reading, found: Conversations) -> None:
    """Count the conversations that were dropped as they were encoded."""
    counts = Counter(reading.conversations)
    counts.update(found.dropped)
    reading.conversations, reading.refusal = dict(counts), reading.refusal or found.refusal


class Spool(Spooled):
    """The ids of one domain's documents on the disk, which grow.

    Attributes:
        num_documents, num_tokens: number of documents and of tokens in the spool.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        dtype: str,
        *,
        num_documents: int = 0,
        num_tokens: int = 0,
        has_targets: bool = False,
    ) -> None:
        """Open or create the files; truncate them to their first `num_documents` documents and `num_tokens` tokens."""
        super().__init__([directory / name], dtype)
        names = ("ids", "documents", "targets")[: 3 if has_targets else 2]
        self._paths = [directory / f"{name}.{of_file}" for of_file in names]
        self.num_documents, self.num_tokens = num_documents, num_tokens
        self._open_tokens = 0
        sizes = num_tokens * np.dtype(dtype).itemsize, num_documents * RECORD.itemsize, num_tokens
        self._streams = [path.open("ab") for path in self._paths]
        for stream, size in zip(self._streams, sizes, strict=False):
            stream.truncate(size)

    def append_batch(self, batch: TextBatch, encoded: Encoded, kept: npt.NDArray[np.bool_] | None = None) -> None:
        """Add the parts of a batch, but for documents that are not kept (None: all are).

        Of conversations `kept` is of those that the encoder has kept.
        """
        closes, found = np.array([part.closes for part in batch.parts]), encoded.conversations
        if found is None:
            self.append(encoded.ids, encoded.lengths, closes, batch.digests, batch.num_bytes, kept)
            return
        digests = [digest for digest, there in zip(batch.digests, found.kept, strict=True) if there]
        self.append(found.ids, found.lengths, closes[found.kept], digests, found.num_bytes, kept, found.targets)

    def append(
        self,
        ids: Ids,
        lengths: npt.NDArray[np.int64],
        closes: npt.NDArray[np.bool_],
        digests: Sequence[bytes],
        num_bytes: Sequence[int],
        kept: npt.NDArray[np.bool_] | None = None,
        targets: Targets | None = None,
    ) -> None:
        """Add parts of documents: their ids in a row, the number of ids of each, and True for those that end one.

        `digests`, `num_bytes` and `kept` are of the documents that end here; those that are not kept are left out
        (None: all are). The next call goes on with a document that does not end here.
        `targets` are those of the ids, for a spool that has them.
        """
        ends = np.cumsum(lengths)[closes]
        records = np.empty(len(ends), RECORD)
        # The first 8 of a digest's 16 bytes are enough to rank by.
        records["key"] = np.frombuffer(b"".join(digests), ">u8")[::2]
        records["bytes"] = num_bytes
        records["tokens"] = np.diff(ends, prepend=-self._open_tokens)
        begun = self._open_tokens
        self._open_tokens = len(ids) - int(ends[-1]) if len(ends) else self._open_tokens + len(ids)
        if kept is not None and not kept.all():
            if not kept[0] and begun:  # earlier calls have written its begin
                self.num_tokens -= begun
                self._streams[0].truncate(self.num_tokens * np.dtype(self.dtype).itemsize)
            of_document: npt.NDArray[np.int64] = np.cumsum(closes) - closes
            stays = np.repeat(np.append(kept, True)[of_document], lengths)
            ids, targets = ids[stays], None if targets is None else targets[stays]
            records = records[kept]
        self._streams[0].write(ids.data)
        self._streams[1].write(records.data)
        if targets is not None:
            self._streams[2].write(targets.data)
        self.num_documents += len(records)
        self.num_tokens += len(ids)

    def sync(self) -> None:
        """Write everything to the disk, by fsync."""
        for stream in self._streams:
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Close the files. Documents added since the last `sync` can be lost; a full disk raises no error."""
        for stream in self._streams:
            try:
                stream.close()
            except OSError:
                stream.raw.close()

    def remove(self) -> None:
        """Close and delete the files."""
        self.close()
        for path in self._paths:
            path.unlink(missing_ok=True)
