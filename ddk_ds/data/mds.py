"""One split of one domain: documents are packed into samples of L tokens, which an MDS directory holds.

A split is written with mosaicml-streaming's MDSWriter, checked by its index, and read sample by sample with streaming's
own reader.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ddk_ds.data.adopted_shards import entry_shards, is_adopted, shard_reader
from ddk_ds.data.store import AGAIN, LocalStore, Shard, Store
from ddk_ds.errors import DataError, UserError

if TYPE_CHECKING:
    from streaming import MDSWriter

Ids = npt.NDArray[np.unsignedinteger[Any]]
"""Token ids in the shards' dtype, uint16 or uint32."""
Lengths = npt.NDArray[np.integer[Any]]
"""The number of a sample's tokens that each of its documents has, (d,), with the sum L."""
Targets = npt.NDArray[np.bool_]
"""True for each of a sample's tokens (L,) that is a target: one that a model is to predict."""
SHARD_BYTES = 1 << 26
_COLUMN, _BORDERS, _TARGETS = "tokens", "documents", "targets"
BORDERS_ENCODING = "ndarray:uint32"
_VERSION = 2


class Packed(NamedTuple):
    """A sample: its token ids (L,) in the shards' dtype, and its documents' lengths; None without borders.

    `targets` is None where all tokens are targets, as those of text.
    """

    tokens: Ids
    lengths: Lengths | None
    targets: Targets | None = None


def pack(documents: Iterable[Ids], sequence_length: int) -> Iterator[Ids]:
    """Yield samples of `sequence_length` ids cut from the joined documents; a tail shorter than a sample is dropped."""
    buffer: list[Ids] = []
    buffered_tokens = 0
    for document in documents:
        buffer.append(document)
        buffered_tokens += len(document)
        if buffered_tokens < sequence_length:
            continue
        joined = np.concatenate(buffer)
        packed_tokens = buffered_tokens - buffered_tokens % sequence_length
        yield from joined[:packed_tokens].reshape(-1, sequence_length)
        buffer = [joined[packed_tokens:]]
        buffered_tokens -= packed_tokens


def pack_lengths(documents: Iterable[Lengths], sequence_length: int) -> Iterator[Lengths]:
    """Yield the documents' lengths in each sample of `pack`, from the lengths of the documents, in chunks of any size.

    A document that reaches over the end of a sample is two documents to the samples.
    """
    for lengths, counts in packed_lengths(documents, sequence_length):
        yield from np.split(lengths, np.cumsum(counts)[:-1])


def packed_lengths(documents: Iterable[Lengths], sequence_length: int) -> Iterator[tuple[Lengths, Lengths]]:
    """Yield, for some samples at a time, the lengths of their documents (m,) and the number of those of each (k,)."""
    rest = np.zeros(0, np.int64)
    for chunk in documents:
        ends = np.cumsum(np.concatenate([rest, chunk]))
        full = int(ends[-1]) // sequence_length * sequence_length if len(ends) else 0
        if full:
            samples = np.arange(sequence_length, full + 1, sequence_length)
            edges = np.union1d(ends[ends <= full], samples)
            yield np.diff(edges, prepend=0), np.diff(np.searchsorted(edges, samples), prepend=-1)
        rest = np.diff(ends[ends > full], prepend=full)


def token_dtype(vocab_size: int) -> str:
    """Return the narrowest dtype of the shards that holds every id: "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_split(
    directory: Path,
    samples: Iterable[Ids],
    *,
    sequence_length: int,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
    lengths: Iterable[Lengths] | None = None,
    targets: Iterable[Targets] | None = None,
) -> dict[str, Any]:
    """Write samples, each (sequence_length,), to a new directory; with `lengths`, also the borders of their documents.

    With `targets` beside `lengths`, also which tokens are targets, a bit each.

    Returns {"samples": int, "sha": str, "largest_id": int}, with `targets` also "target_tokens", their number.
    """
    largest_id, target_tokens = -1, 0
    masks = repeat(None) if targets is None else targets
    more = repeat((None, None)) if lengths is None else zip(lengths, masks, strict=targets is not None)
    columns = {"borders": lengths is not None, "targets": targets is not None}
    with split_writer(directory, sequence_length, dtype, shard_bytes, **columns) as writer:
        for sample, (of_sample, mask) in zip(samples, more, strict=lengths is not None):
            largest_id = max(largest_id, int(sample.max()))
            target_tokens += 0 if mask is None else int(mask.sum())
            writer.write(sample_record(sample.astype(dtype, copy=False), of_sample, mask))
    index = read_index(LocalStore(directory.parent), directory.name)
    counted = {} if targets is None else {"target_tokens": target_tokens}
    return {"samples": index.num_samples, "sha": index.sha, "largest_id": largest_id, **counted}


def split_writer(
    directory: Path, sequence_length: int, dtype: str, shard_bytes: int, *, borders: bool, targets: bool = False
) -> MDSWriter:
    """Return the writer of a split's samples, with or without the borders of their documents, and their targets."""
    # Importing streaming takes seconds (torchvision, transformers), which checking an index must not pay.
    from streaming import MDSWriter

    columns = {_COLUMN: f"ndarray:{dtype}:{sequence_length}"} | ({_BORDERS: BORDERS_ENCODING} if borders else {})
    columns |= {_TARGETS: _targets_encoding(sequence_length)} if targets else {}
    return MDSWriter(out=str(directory), columns=columns, hashes=["xxh64"], size_limit=shard_bytes)


def sample_record(tokens: Ids, lengths: Lengths | None, targets: Targets | None = None) -> dict[str, Any]:
    """Return the columns of a sample: ids (L,) in the shards' dtype, lengths of its documents (d,), targets (L,)."""
    borders = {} if lengths is None else {_BORDERS: lengths.astype(np.uint32)}
    return {_COLUMN: tokens, **borders, **({} if targets is None else {_TARGETS: np.packbits(targets)})}


def _targets_encoding(sequence_length: int) -> str:
    return f"ndarray:uint8:{-(-sequence_length // 8)}"


@dataclass(frozen=True)
class SplitIndex:
    """The content of a split's index.json. `sha` covers size, number of samples and content hash of every shard.

    `order_sizes` are the numbers of samples in the shards by which a run orders its samples: of adopted ones those of
    shards prepared from the same ids, so that the order is the same. `beside` are the files that must be there and
    whole to read the shards with these numbers (adopted_shards.py).
    """

    directory: str
    entries: list[dict[str, Any]]
    shards: list[Shard]
    shard_sizes: npt.NDArray[np.int64]
    encodings: set[str]
    sha: str
    order_sizes: npt.NDArray[np.int64]
    beside: dict[int, Shard]

    @property
    def num_samples(self) -> int:
        """Return the number of samples of all shards."""
        return int(self.shard_sizes.sum())

    def check_format(self, dtype: str, sequence_length: int, *, borders: bool, targets: bool = False) -> None:
        """Raise DataError if a shard's samples are not `sequence_length` ids of `dtype`, with or without columns.

        These are `borders` of documents, and which tokens are `targets`.
        """
        wanted = {f"ndarray:{dtype}:{sequence_length}"} | ({BORDERS_ENCODING} if borders else set())
        wanted |= {_targets_encoding(sequence_length)} if targets else set()
        if self.encodings != wanted:
            held, data = (" and ".join(sorted(encodings)) for encodings in (self.encodings, wanted))
            raise DataError(f"{self.directory} holds samples of {held}, the data's are {data}; {AGAIN}")


def read_index(store: Store, directory: str, *, fresh: bool = False) -> SplitIndex:
    """Read a split's index.json and check presence and sizes of local shards, without reading the shards.

    Raises:
        DataError: names the file that is missing, unreadable, of another version or truncated.
    """
    path = f"{store.location}/{directory}/index.json"
    try:
        content = json.loads(store.read(f"{directory}/index.json", fresh=fresh))
        entries = content["shards"]
        versions = {entry["version"] for entry in entries} | {content["version"]}
        if versions != {_VERSION}:
            raise DataError(f"{path} is of version {versions}, this program reads {_VERSION}; prepare the data again")
        sizes = [entry["samples"] for entry in entries]
        found = [_shards(directory, entry) for entry in entries]
        encodings = {encoding for entry in entries for encoding in entry.get("read_as", entry["column_encodings"])}
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {AGAIN}") from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error!r}); {AGAIN}") from None
    shards = [shard for shard, _ in found]
    beside = {number: file for number, (_, file) in enumerate(found) if file is not None}
    store.check(directory, [*shards, *set(beside.values())])
    order = content.get("order", sizes)
    if sum(order) != sum(sizes):
        raise DataError(f"{path} is damaged: its order is of {sum(order):,} samples, it has {sum(sizes):,}; {AGAIN}")
    of_shards, of_order = (np.array(numbers, np.int64) for numbers in (sizes, order))
    return SplitIndex(directory, entries, shards, of_shards, encodings, content_hash(content), of_order, beside)


def content_hash(content: dict[str, Any]) -> str:
    """Return the hash of an index's content, without the places of adopted shards, which may move with their index."""
    held = [{key: value for key, value in entry.items() if key != "path"} for entry in content["shards"]]
    held += [{"order": content["order"]}] if "order" in content else []
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def _shards(directory: str, entry: dict[str, Any]) -> tuple[Shard, Shard | None]:
    """Return the shard of an index's entry, and the file that must be beside it, if there is one."""
    if is_adopted(entry):
        return entry_shards(directory, entry)
    raw = entry["raw_data"]
    return Shard(f"{directory}/{raw['basename']}", int(raw["bytes"]), raw["hashes"].get("xxh64")), None


class Split:
    """Random access to the samples of one split, through streaming's own MDS reader: no locks, no open files.

    Attributes:
        shard_sizes: (S,) number of samples of each shard.
        order_sizes: numbers of samples by which a run orders them, see `SplitIndex`.
        shards: the S shard files.
        num_samples: number of samples of all shards.
        sha: hash of the index.
    """

    def __init__(self, store: Store, index: SplitIndex, vocab_size: int | None = None) -> None:
        """Open the split of an index. Samples with ids >= `vocab_size` raise DataError; None: any id is accepted."""
        self._store = store
        self._vocab_size = vocab_size
        self.shard_sizes = index.shard_sizes
        self.order_sizes = index.order_sizes
        self.shards = index.shards
        self.num_samples = index.num_samples
        self.sha = index.sha
        self._first = np.cumsum(index.shard_sizes) - index.shard_sizes
        # Made here, and not at the first read, so that forked workers have what they import from their parent.
        self._readers = [shard_reader(entry) for entry in index.entries]
        self._beside = index.beside

    def __len__(self) -> int:
        return self.num_samples

    def first_uses(self, samples: npt.NDArray[np.int64]) -> list[tuple[int, Shard]]:
        """Return a pair (index in `samples` (n,) of the first one, shard) for every shard that holds one of them."""
        numbers, positions = np.unique(np.searchsorted(self._first, samples, "right") - 1, return_index=True)
        return [(int(at), self.shards[number]) for at, number in zip(positions, numbers, strict=True)]

    def _shard_number(self, i: int) -> int:
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of a split that has {self.num_samples}")
        return int(np.searchsorted(self._first, i, side="right")) - 1

    def record(self, i: int) -> tuple[dict[str, Any], str]:
        """Return the columns of sample `i`, and a text that says where it is.

        Raises DataError where its shard is damaged or cannot be fetched.
        """
        number = self._shard_number(i)
        shard, reader, place = self.shards[number], self._readers[number], int(i - self._first[number])
        while True:
            path = self._store.shard(shard)
            if number in self._beside:
                self._store.shard(self._beside[number])
            reader.dirname = str(path.parent)
            try:
                return reader[place], f"shard {path} of domain {shard.domain!r}: sample {place}"
            except FileNotFoundError:
                continue  # evicted by another process since the line before

    def tokens(self, i: int) -> Ids:
        """Return the ids (L,) of sample `i` in the shards' dtype. Raises DataError as `packed` does."""
        return self.packed(i).tokens

    def packed(self, i: int) -> Packed:
        """Return sample `i`.

        Raises DataError where its shard is damaged or cannot be fetched, or holds an id outside of the vocabulary.
        """
        record, where = self.record(i)
        tokens: Ids = record[_COLUMN]
        if self._vocab_size is not None and int(tokens.max()) >= self._vocab_size:
            raise DataError(
                f"{where} holds id {int(tokens.max())}, the vocabulary has {self._vocab_size:,}; prepare the data with "
                "the student's tokenizer"
            )
        mask = record.get(_TARGETS)
        targets = None if mask is None else np.unpackbits(mask, count=len(tokens)).view(np.bool_)
        return Packed(tokens, record.get(_BORDERS), targets)


def open_split(store: Store, directory: str, vocab_size: int | None = None) -> Split:
    """Read the index of a split, check that its local shards exist with their sizes, and open it.

    A sample with an id >= `vocab_size` raises DataError when it is read; None accepts any id. Raises DataError, naming
    the file, if the index or a shard is missing or damaged.
    """
    return Split(store, read_index(store, directory), vocab_size)
