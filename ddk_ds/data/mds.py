"""Pure decisions about token sequences: which documents are held out, and how documents become samples.

One split of one domain on disk: an MDS directory of samples of exactly L tokens; write, check, read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddk_ds.data.store import AGAIN, LocalStore, Shard, Store
from ddk_ds.errors import DataError

Ids = npt.NDArray[np.unsignedinteger[Any]]
"""Token ids in the shards' dtype, uint16 or uint32."""


Keys = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """Which documents are held out: those whose key is under `key`, and of those that have it the first ones,
    up to document number `last`."""

    key: int
    last: int = -1

    def mask(self, keys: Keys, first: int) -> npt.NDArray[np.bool_]:
        """(n,) whether each document is held out.

        Args:
            keys: (n,) of consecutive documents.
            first: number of the first of them.
        """
        key = np.uint64(self.key)
        return np.asarray((keys < key) | ((keys == key) & (np.arange(first, first + len(keys)) <= self.last)))


def choose_validation(
    chunks: Iterable[tuple[Keys, Counts]], *, min_tokens: int | None = None, fraction: float | None = None
) -> HeldOut:
    """Choose the documents with the smallest keys, whatever their order; memory holds a chunk and the chosen ones.

    Args:
        chunks: keys (n,), a hash of each document's content, uniform over 64 bits; tokens (n,) of each document.
        min_tokens: take the smallest keys until this many tokens are held out, or all documents.
        fraction: or take keys under `fraction` of the range. Exactly one of the two is given.
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


SHARD_BYTES = 1 << 26
_COLUMN = "tokens"
_VERSION = 2


def token_dtype(vocab_size: int) -> str:
    """The narrowest dtype of the shards that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_split(
    directory: Path,
    samples: Iterable[Ids],
    *,
    sequence_length: int,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write samples, (sequence_length,) each, to a new directory; returns {"samples": int, "sha": str}."""
    # Importing streaming takes seconds (torchvision, transformers), which checking an index must not pay.
    from streaming import MDSWriter

    columns = {_COLUMN: f"ndarray:{dtype}:{sequence_length}"}
    with MDSWriter(out=str(directory), columns=columns, hashes=["xxh64"], size_limit=shard_bytes) as writer:
        for sample in samples:
            writer.write({_COLUMN: sample.astype(dtype, copy=False)})
    index = read_index(LocalStore(directory.parent), directory.name)
    return {"samples": index.num_samples, "sha": index.sha}


@dataclass(frozen=True)
class SplitIndex:
    """What the index.json of a split says. `sha` covers sizes, samples and content hashes of every shard."""

    directory: str
    entries: list[dict[str, Any]]
    shards: list[Shard]
    shard_sizes: npt.NDArray[np.int64]
    encodings: set[str]
    sha: str

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return int(self.shard_sizes.sum())

    def check_format(self, dtype: str, sequence_length: int) -> None:
        """DataError if a shard's samples are not `sequence_length` ids of `dtype`."""
        wanted = f"ndarray:{dtype}:{sequence_length}"
        if other := self.encodings - {wanted}:
            raise DataError(f"{self.directory} holds samples of {other.pop()}, the data's are {wanted}; {AGAIN}")


def read_index(store: Store, directory: str, *, fresh: bool = False) -> SplitIndex:
    """Read a split's index.json and check what can be without reading shards: presence and sizes of local ones.

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
        shards = [_shard(directory, entry["raw_data"]) for entry in entries]
        encodings = {encoding for entry in entries for encoding in entry["column_encodings"]}
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {AGAIN}") from None
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); {AGAIN}") from None
    store.check(directory, shards)
    sha = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
    return SplitIndex(directory, entries, shards, np.array(sizes, np.int64), encodings, sha)


def _shard(directory: str, raw: dict[str, Any]) -> Shard:
    return Shard(f"{directory}/{raw['basename']}", int(raw["bytes"]), raw["hashes"].get("xxh64"))


class Split:
    """Random access to the samples of one split, through streaming's own MDS reader: no locks, no open files.

    Attributes:
        shard_sizes: (S,) samples of each shard.
        shards: their files.
        num_samples: sum of shard_sizes.
        sha: hash of the index.
    """

    def __init__(self, store: Store, index: SplitIndex, vocab_size: int | None = None) -> None:
        """`vocab_size`: refuse samples with ids from here on; None: any."""
        # As in write_split; not delayed until the first read: forked workers have it from their parent.
        from streaming.base.format import reader_from_json

        self._store = store
        self._vocab_size = vocab_size
        self.shard_sizes = index.shard_sizes
        self.shards = index.shards
        self.num_samples = index.num_samples
        self.sha = index.sha
        self._first = np.cumsum(index.shard_sizes) - index.shard_sizes
        self._readers = [reader_from_json("", None, entry) for entry in index.entries]

    def __len__(self) -> int:
        return self.num_samples

    def tokens(self, i: int) -> Ids:
        """(L,) ids of sample `i` in the shards' dtype. Raises DataError where its shard is damaged or cannot be had."""
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of a split that has {self.num_samples}")
        number = int(np.searchsorted(self._first, i, side="right")) - 1
        shard, reader, place = self.shards[number], self._readers[number], int(i - self._first[number])
        while True:
            path = self._store.shard(shard)
            reader.dirname = str(path.parent)
            try:
                tokens: Ids = reader[place][_COLUMN]
                break
            except FileNotFoundError:
                continue  # evicted by another process since the line before
        if self._vocab_size is not None and int(tokens.max()) >= self._vocab_size:
            raise DataError(
                f"shard {path} of domain {shard.domain!r}: sample {place} holds id {int(tokens.max())}, the vocabulary "
                f"has {self._vocab_size:,}; prepare the data with the run's tokenizer"
            )
        return tokens


def open_split(store: Store, directory: str, vocab_size: int | None = None) -> Split:
    """Check a split against its index and open it; DataError names the file that is wrong."""
    return Split(store, read_index(store, directory), vocab_size)
