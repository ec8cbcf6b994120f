"""Shards that `ddk adopt` took over: they lie where they were, in their own encoding, and are read there.

The index.json of such a split is this project's. Its entries are those of an MDS index, with more keys:

    path        the file, from the data's root or absolute
    read_as     the encodings that its samples have once they are read, as those of prepared samples
    first       number in the file of the shard's first sample (MDS)
    ids         dtype of the ids in a column of bytes, as llm-foundry's (MDS)
    borders     ["after", id]: a document ends with each such id; ["before", id]: it begins with it (MDS)
    begin       first byte of the shard in the file (.bin; documents are those of the .idx beside it)
    documents   size and hash of that .idx
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ddk_ds.data.megatron import read_document_index
from ddk_ds.data.store import Shard

BIN = "bin"
"""The format of an entry that is a part of a .bin file."""
Side = Literal["after", "before"]
_MORE = ("path", "read_as", "first", "ids", "borders")


def is_adopted(entry: dict[str, Any]) -> bool:
    """Return True if an entry of an index is of a shard that was adopted."""
    return "read_as" in entry


def entry_shards(directory: str, entry: dict[str, Any]) -> tuple[Shard, Shard | None]:
    """Return the shard of an adopted entry, and the .idx that its documents are in, if there is one."""
    raw, path = entry["raw_data"], entry["path"]
    name = f"{directory}/{raw['basename']}"
    shard = Shard(name, int(raw["bytes"]), raw["hashes"]["xxh64"], path, entry.get("begin"))
    if "documents" not in entry:
        return shard, None
    of_documents = str(Path(path).with_suffix(".idx"))
    known = entry["documents"]
    return shard, Shard(f"{directory}/{Path(of_documents).name}", int(known["bytes"]), known["xxh64"], of_documents)


def shard_reader(entry: dict[str, Any]) -> Any:
    """Return the reader of a shard of any kind: its columns by a sample's number, once `dirname` is set."""
    # Importing streaming takes seconds, which checking an index must not pay.
    from streaming.base.format import reader_from_json

    if not is_adopted(entry):
        return reader_from_json("", None, entry)
    if entry["format"] == BIN:
        return _BinReader(entry)
    plain = {key: value for key, value in entry.items() if key not in _MORE}
    plain["raw_data"] = {**entry["raw_data"], "basename": Path(entry["path"]).name}
    return _MdsReader(entry, reader_from_json("", None, plain))


def border_lengths(ids: npt.NDArray[np.integer[Any]], side: Side, border: int) -> npt.NDArray[np.int64]:
    """Return the lengths of a sample's documents, each of which ends after, or begins before, an id `border`."""
    places = np.flatnonzero(ids == border) + (side == "after")
    return np.diff(np.unique([0, *places, len(ids)]))


def as_ids(values: Any, dtype: str | None) -> npt.NDArray[np.integer[Any]]:
    """Return the numbers (L,) in a column: an array, or bytes of `dtype`."""
    found = np.frombuffer(values, dtype) if isinstance(values, bytes) else values.ravel()
    return np.asarray(found)


def read_dtype(entry: dict[str, Any]) -> tuple[str, int]:
    """Return the dtype and number of ids of a sample as it is read, from "ndarray:uint16:2048"."""
    _, dtype, length = entry["read_as"][0].split(":")
    return dtype, int(length)


class _MdsReader:
    """Samples of an MDS shard with a column `tokens` of another encoding."""

    def __init__(self, entry: dict[str, Any], reader: Any) -> None:
        self._reader, self._first = reader, int(entry["first"])
        self._dtype, self._ids, self._borders = read_dtype(entry)[0], entry.get("ids"), entry.get("borders")

    @property
    def dirname(self) -> str:
        return str(self._reader.dirname)

    @dirname.setter
    def dirname(self, value: str) -> None:
        self._reader.dirname = value

    def __getitem__(self, place: int) -> dict[str, Any]:
        ids = as_ids(self._reader[self._first + place]["tokens"], self._ids).astype(self._dtype)
        if self._borders is None:
            return {"tokens": ids}
        return {"tokens": ids, "documents": border_lengths(ids, *self._borders)}


class _BinReader:
    """Samples of a part of a .bin file: its ids in a row, cut at each sample's end."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.dirname = ""
        self._name, self._begin = Path(entry["path"]).name, int(entry["begin"])
        self._dtype, self._length = read_dtype(entry)

    def __getitem__(self, place: int) -> dict[str, Any]:
        path = Path(self.dirname) / self._name
        index = read_document_index(path.with_suffix(".idx"))
        offset = self._begin + place * self._length * index.dtype.itemsize
        ids = np.fromfile(path, index.dtype, self._length, offset=offset)
        begin = offset // index.dtype.itemsize
        return {"tokens": ids.astype(self._dtype), "documents": index.lengths(begin, begin + self._length)}
