"""One split of one domain on disk: an MDS directory of samples of exactly L tokens; write, check, read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddk_ds.data.packing import Ids
from ddk_ds.errors import DataError

SHARD_BYTES = 1 << 26
AGAIN = "prepare the data again, or copy it again whole"
_COLUMN = "tokens"


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
    index = read_index(directory)
    return {"samples": index.num_samples, "sha": index.sha}


@dataclass(frozen=True)
class SplitIndex:
    """What index.json says. `sha` covers sizes, samples and content hashes of every shard."""

    directory: Path
    shards: list[dict[str, Any]]
    shard_sizes: npt.NDArray[np.int64]
    sha: str

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return int(self.shard_sizes.sum())


def read_index(directory: Path) -> SplitIndex:
    """Read index.json and check that every shard is there with its full size; reads no shard.

    Raises:
        DataError: names the file that is missing, unreadable or truncated.
    """
    path = directory / "index.json"
    try:
        shards = json.loads(path.read_bytes())["shards"]
        sizes = [shard["samples"] for shard in shards]
        files = [(directory / shard["raw_data"]["basename"], shard["raw_data"]["bytes"]) for shard in shards]
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {AGAIN}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); {AGAIN}") from None
    for file, num_bytes in files:
        if not file.is_file():
            raise DataError(f"shard {file} is missing; {AGAIN}")
        if file.stat().st_size != num_bytes:
            raise DataError(f"shard {file} has {file.stat().st_size:,} bytes, its index says {num_bytes:,}; {AGAIN}")
    sha = hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()
    return SplitIndex(directory, shards, np.array(sizes, np.int64), sha)


class Split:
    """Random access to the samples of one split, through streaming's own MDS reader: no locks, no open files.

    Attributes:
        directory: where it is.
        shard_sizes: (S,) samples of each shard.
        num_samples: their sum.
        sha: hash of the index.
    """

    def __init__(self, index: SplitIndex) -> None:
        # As in write_split; not delayed until the first read: forked workers have it from their parent.
        from streaming.base.format import reader_from_json

        self.directory = index.directory
        self.shard_sizes = index.shard_sizes
        self.num_samples = index.num_samples
        self.sha = index.sha
        self._first = np.cumsum(index.shard_sizes) - index.shard_sizes
        self._readers = [reader_from_json(str(index.directory), None, shard) for shard in index.shards]

    def __len__(self) -> int:
        return self.num_samples

    def tokens(self, i: int) -> npt.NDArray[np.int64]:
        """(L,) ids of sample `i`."""
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of {self.directory}, which has {self.num_samples}")
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        tokens: Ids = self._readers[shard][int(i - self._first[shard])][_COLUMN]
        return tokens.astype(np.int64)


def open_split(directory: Path) -> Split:
    """Check a split's shards against its index and open it; DataError names the file that is wrong."""
    return Split(read_index(directory))
