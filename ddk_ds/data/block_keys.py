"""The pass of keys: which documents of all blocks are taken, known before a single one is tokenised.

Each block's texts are read once and hashed. The join goes through the hashes in the order of the recipe, as one process
does: a text that stands in two places belongs to the first, and a domain ends at its max_bytes. The texts are read a
second time to be tokenised, which compares them with their hashes. Reading takes some thirtieth of tokenising, and the
pass spares the tokenising of duplicates and of all that lies behind max_bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddk_ds.data.blocks import Block, PartsJob, put, unit_directory
from ddk_ds.data.documents import Dropped, Position, read_documents
from ddk_ds.errors import DataError
from ddk_ds.files import write_text

_KEY = np.dtype([("high", ">u8"), ("low", ">u8"), ("bytes", "<i8")])
"""A document: its digest of 16 bytes, and the bytes of its text (UTF-8)."""
_DIGEST_BYTES = 16
_KEYS = 1 << 16
BUCKET_KEYS = 1 << 24
"""Keys that are compared at a time: 0.7 GB of memory."""


class _Unseen:
    """Digests of no document: duplicates are the join's to find."""

    def __contains__(self, digest: object) -> bool:
        return False

    def add(self, digest: bytes) -> None: ...


@dataclass(frozen=True)
class KeysStage:
    """Reads the texts of blocks; a result has the key of each document that is long enough and is UTF-8."""

    job: PartsJob
    blocks: Sequence[Block]
    name: str = "keys"

    @property
    def weights(self) -> Sequence[int]:
        """Return the stored bytes of the blocks."""
        return [block.num_bytes for block in self.blocks]

    def result(self, unit: int) -> Path:
        """Return the path of a block's counts, which are written after its keys."""
        return self.job.path("keys", f"{self.blocks[unit].number}.json")

    def run(self, units: Iterable[int]) -> None:
        """Read the texts of blocks. Raises DataError if they cannot be read, OSError if the disk is full."""
        for unit in units:
            self._read(self.blocks[unit], self.result(unit))

    def _read(self, block: Block, result: Path) -> None:
        domain = self.job.recipe.domains[block.domain].model_copy(update={"max_bytes": None})
        dropped, documents, texts, last = Dropped(), 0, 0, 0
        with unit_directory(result) as directory:
            with (directory / "keys").open("wb") as stream:
                for file in self.job.files_of(block):
                    position = Position()
                    found = read_documents(
                        domain,
                        [file],
                        seed=self.job.seed,
                        seen=_Unseen(),
                        dropped=dropped,
                        position=position,
                        scratch=directory,
                    )
                    for document in found:
                        stream.write(document.digest + document.num_bytes.to_bytes(8, "little"))
                        documents, last = documents + 1, texts + position.texts
                    texts += position.texts
            put(directory / "keys", _path(self.job, block, "keys"))
        write_text(result, json.dumps(asdict(BlockCounts(documents, texts, last, dropped.bad_lines))))


@dataclass(frozen=True)
class BlockCounts:
    """Numbers of a block's documents and texts, the number of the text that its last document is, and of bad lines."""

    documents: int
    texts: int
    last: int
    bad_lines: int


@dataclass(frozen=True)
class Taken:
    """The bytes and bad lines of its domain before a block, and the number of documents that reading it meets."""

    num_bytes: int
    bad_lines: int
    documents: int


def take_documents(job: PartsJob, blocks: Sequence[Block]) -> tuple[dict[int, Taken], set[str]]:
    """Write which documents of the blocks are taken; return the blocks that are read, and domains that need more.

    One byte for each document is in memory, and BUCKET_KEYS keys.

    Args:
        blocks: those whose keys are there, in order: for each domain the first ones.

    Returns:
        What is known of each block that is to be tokenised, by its number; and the domains that `blocks` do not show
        to reach their max_bytes.
    """
    counts = [BlockCounts(**json.loads(KeysStage(job, [block]).result(0).read_text())) for block in blocks]
    ends = np.cumsum([count.documents for count in counts], dtype=np.int64)
    kept = np.ones(int(ends[-1]), np.bool_)
    flags = np.split(kept, ends[:-1])  # views, which change it
    taken: dict[int, Taken] = {}
    short = set()
    first = 0
    for name, domain in job.recipe.domains.items():
        end = first + sum(block.domain == name for block in blocks)
        # What is behind max_bytes belongs to a later domain that has it too, so domains up to this one come first.
        if domain.max_bytes is not None or end == len(blocks):
            _drop_duplicates(job, blocks[:end], flags[:end], kept)
        if not _take_domain(job, domain.max_bytes, blocks[first:end], counts[first:end], flags[first:end], taken):
            short.add(name)
        first = end
    for block, of_block in zip(blocks, flags, strict=True):
        if block.number in taken:
            of_block.tofile(_path(job, block, "partial"))
            put(_path(job, block, "partial"), _path(job, block, "kept"))
    return taken, short


def _drop_duplicates(
    job: PartsJob, blocks: Sequence[Block], flags: Sequence[npt.NDArray[np.bool_]], kept: npt.NDArray[np.bool_]
) -> None:
    """Clear the flag of each document of `blocks` that is kept and is no other than one before it."""
    buckets = -(-sum(int(of_block.sum()) for of_block in flags) // BUCKET_KEYS)
    for bucket in range(buckets):
        numbers, highs, lows = [], [], []
        begin = 0
        for block in blocks:
            for keys in _keys(job, block):
                chosen = np.flatnonzero(kept[begin : begin + len(keys)] & (keys["low"] % buckets == bucket))
                numbers.append(begin + chosen)
                highs.append(keys["high"][chosen].astype(np.uint64))
                lows.append(keys["low"][chosen].astype(np.uint64))
                begin += len(keys)
        number, high, low = (np.concatenate(arrays) for arrays in (numbers, highs, lows))
        order = np.lexsort((low, high))  # stable: of equal keys the first document comes first
        same = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
        kept[number[order[1:][same]]] = False


def _take_domain(
    job: PartsJob,
    cap: int | None,
    blocks: Sequence[Block],
    counts: Sequence[BlockCounts],
    flags: Sequence[npt.NDArray[np.bool_]],
    taken: dict[int, Taken],
) -> bool:
    """Add to `taken` the blocks of a domain that are read, and clear the flags of the documents behind `cap`.

    Returns False if the blocks do not show where reading ends: the text after the one that reaches `cap`, at which one
    process stops, is not in them.
    """
    num_bytes, bad_lines, ended = 0, 0, False
    for block, count, kept in zip(blocks, counts, flags, strict=True):
        if ended:
            kept[:] = False
            continue
        read = count.documents
        ends = np.full(1, num_bytes)
        if cap is not None:
            sizes = np.concatenate([ends[:0], *(keys["bytes"] for keys in _keys(job, block))])
            ends = num_bytes + np.cumsum(sizes * kept)
            # With the document that reaches max_bytes; one more than there are if none does.
            read = 0 if num_bytes >= cap else int(np.searchsorted(ends, cap)) + 1
            kept[read:] = False
            ended = read < count.documents or (read == count.documents and count.texts > count.last)
        taken[block.number] = Taken(num_bytes, bad_lines, min(read, count.documents))
        num_bytes, bad_lines = int(ends[-1]) if len(ends) else num_bytes, bad_lines + count.bad_lines
    return ended or cap is None


class TakenDocuments:
    """The digests that read_documents has seen, as it asks when a block is read to be tokenised.

    Raises DataError where a text is not the one whose digest the pass of keys has written.
    """

    def __init__(self, job: PartsJob, block: Block, taken: Taken) -> None:
        """Open nothing yet; the keys are read as the texts are."""
        self._job, self._block = job, block
        self._documents = self._read()
        self._left = taken.documents

    def __contains__(self, digest: object) -> bool:
        known, taken = next(self._documents, (b"", False))
        if known != digest:
            raise self._changed()
        self._left -= 1
        return not taken

    def check_end(self) -> None:
        """Raise DataError if texts are missing."""
        if self._left:
            raise self._changed()

    def _changed(self) -> DataError:
        files = self._job.files_of(self._block)
        return DataError(
            f"domain {self._block.domain!r}: a text of {files[0].where} (or of the {len(files) - 1:,} files after it) "
            "changed while the data were prepared: give --start-anew, and leave the text as it is meanwhile"
        )

    def add(self, digest: bytes) -> None:
        """Do nothing: what a document is a copy of is known."""

    def _read(self) -> Iterator[tuple[bytes, bool]]:
        with _path(self._job, self._block, "kept").open("rb") as stream:
            for keys in _keys(self._job, self._block):
                flags = np.fromfile(stream, np.bool_, len(keys))
                for key, taken in zip(keys, flags.tolist(), strict=True):
                    yield key.tobytes()[:_DIGEST_BYTES], taken


def _keys(job: PartsJob, block: Block) -> Iterator[npt.NDArray[np.void]]:
    """Yield a block's keys in chunks."""
    with _path(job, block, "keys").open("rb") as stream:
        while len(keys := np.fromfile(stream, _KEY, _KEYS)):
            yield keys


def _path(job: PartsJob, block: Block, suffix: str) -> Path:
    return job.path("keys", f"{block.number}.{suffix}")
