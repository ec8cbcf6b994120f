"""Data sets of the library `datasets`: on a Hugging Face hub, read as a stream, and saved by its `save_to_disk`.

A hub's data set is read at one commit, so that its text is the same whenever it is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ddk_ds.data.columns import BATCH_ROWS, Values, check_text, values_of
from ddk_ds.data.remote import describe
from ddk_ds.errors import DataError, UserError

if TYPE_CHECKING:
    import datasets

_ADDRESS = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/?")
_FIRST_SPLIT = "train"
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
"""The end of a complete stream of Arrow: a continuation mark and the length 0 (Arrow's format, "IPC streaming")."""
_NO_ACCESS = (
    "check the address; accept the terms of a gated one on the hub, and set HF_TOKEN to a token that may read it"
)
_MENDING = {
    "DatasetNotFoundError": _NO_ACCESS,
    "GatedRepoError": _NO_ACCESS,
    "RepositoryNotFoundError": _NO_ACCESS,
    "RevisionNotFoundError": "check what is behind the @",
}


@dataclass(frozen=True)
class HubShard:
    """Shard number `number` of the `count` that datasets cuts a split into, usually one of the split's files.

    `address` is the data set's in the recipe. `commit` is the one that it is read at.
    """

    address: str
    commit: str
    subset: str | None
    split: str
    number: int
    count: int

    @property
    def name(self) -> str:
        """Return a name that is the same for every commit with as many shards."""
        parts = (_named(self.address)[0], self.subset, self.split, f"{self.number:05d}-of-{self.count:05d}")
        return "/".join(part for part in parts if part is not None)

    @property
    def where(self) -> str:
        """Return the shard's place, for messages."""
        return f"hf://datasets/{self.name} at commit {self.commit}"

    def values(self, column: str) -> Iterator[Values]:
        """Yield the column's values in order. Raises DataError if they cannot be read."""
        with _explained(self.where):
            shard = _stream(self.address, self.commit, self.subset, self.split, column).shard(self.count, self.number)
            for table in shard.with_format("arrow").iter(BATCH_ROWS):
                check_text(table.schema, column, self.where)
                # The number of rows is not known before the last.
                yield 0.0, values_of(table.column(column))


def is_hub_dataset(address: str) -> bool:
    """Return True for `hf://datasets/OWNER/NAME[@REVISION]`, and False for the address of a file in it."""
    return _ADDRESS.fullmatch(address) is not None


def commit_of(address: str) -> str:
    """Ask the hub for the commit of a data set's revision, or of its main branch. Raises DataError if it has none."""
    name, revision = _named(address)
    with _explained(address):
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(name, revision=revision).sha
    if commit is None:
        raise DataError(f"{address}: the hub names no commit of it")
    return commit


def hub_shards(address: str, commit: str, subset: str | None, split: str | None, column: str) -> list[HubShard]:
    """Return the shards of a split (None: train) in order.

    Raises:
        DataError: there is no such data set, subset, split or column, the column holds no text, or access is denied.
    """
    split = split or _FIRST_SPLIT
    where = f"{address} at commit {commit}"
    with _explained(where):
        stream = _stream(address, commit, subset, split, None)
        if stream.features is not None:
            check_text(stream.features.arrow_schema, column, where)
    return [HubShard(address, commit, subset, split, number, stream.num_shards) for number in range(stream.num_shards)]


def _named(address: str) -> tuple[str, str | None]:
    """Return owner and name of a hub's data set, and the revision; its own slashes are written as %2F."""
    found = _ADDRESS.fullmatch(address)
    assert found is not None, "is_hub_dataset has been asked"
    return found["name"], unquote(found["revision"]) if found["revision"] else None


def _stream(address: str, commit: str, subset: str | None, split: str, column: str | None) -> datasets.IterableDataset:
    """Return a split as datasets' own stream; with `column`, no other column of parquet files is fetched."""
    import datasets

    builder = datasets.load_dataset_builder(_named(address)[0], subset, revision=commit)
    if builder.hash != commit:
        # datasets takes what an earlier program left in its cache if the hub does not answer.
        raise DataError(f"{address}: datasets gives commit {builder.hash}; check the connection to the hub, run again")
    if column is not None and builder.name == "parquet":
        builder.config.columns, builder.config.batch_size = [column], BATCH_ROWS
    return builder.as_streaming_dataset(split)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn every error of datasets and of the hub's client, which have many types, into a DataError."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise DataError(f"{where} is read by datasets, which is missing: pip install 'ddk_ds[data]'") from error
    except Exception as error:
        fix = _MENDING.get(type(error).__name__, "check address, subset and split, then give the same command again")
        raise DataError(f"{where} cannot be read: {describe(error)}; {fix}") from error


def is_saved(directory: Path) -> bool:
    """Return True if `save_to_disk` wrote a data set, or a split, into the directory."""
    return (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file()


def saved_files(directory: Path, split: str | None) -> list[Path]:
    """Return the Arrow files of a data set that `save_to_disk` wrote into a directory, in order; [] for any other one.

    `split` is one of a DatasetDict's directories, train if it is None.

    Raises DataError if there is no such split, or a file is missing.
    """
    if (directory / "dataset_dict.json").is_file():
        splits = _content(directory / "dataset_dict.json", "splits")
        directory /= split or _FIRST_SPLIT
        if directory.name not in splits:
            raise DataError(f"{directory.parent} has no split {directory.name!r}; set split to one of {splits}")
    elif split is not None and is_saved(directory):
        raise DataError(f"{directory} is one data set without splits: leave split {split!r} out")
    if not is_saved(directory):
        return []
    files = [directory / str(entry["filename"]) for entry in _content(directory / "state.json", "_data_files")]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is missing, which {directory / 'state.json'} names: copy the directory again")
    return files


def _content(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}): save the data set again") from None


def saved_values(path: Path, column: str, where: str) -> Iterator[Values]:
    """Yield the values of a column of an Arrow file that datasets wrote, in order.

    Raises:
        DataError: the column is missing or holds no text.
        EOFError: the file ends early.
        ArrowException: the file is damaged.
    """
    import datasets

    with path.open("rb") as stream:
        stream.seek(max(path.stat().st_size - len(_STREAM_END), 0))
        if stream.read() != _STREAM_END:  # Arrow takes a stream that is cut between two batches for a complete one
            raise EOFError("it ends early, or is no stream of Arrow")
    table = datasets.Dataset.from_file(str(path)).with_format("arrow")
    check_text(table.features.arrow_schema, column, where)
    rows = 0
    for batch in table.iter(BATCH_ROWS):
        rows += batch.num_rows
        yield rows / table.num_rows, values_of(batch.column(column))
