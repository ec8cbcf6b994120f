"""Token shards that another program made, as entries of an index (adopted_shards.py), and their ids.

MDS: directories of mosaicml-streaming with a column `tokens`, as llm-foundry's converters write them. Megatron-LM:
pairs of .bin and .idx. An entry's `path` is absolute here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from ddk_ds.data.adopted_shards import BIN, as_ids
from ddk_ds.data.megatron import DocumentIndex, check_document_index, read_document_index
from ddk_ds.errors import DataError
from ddk_ds.files import read_object

Entry = dict[str, Any]
IdRows = npt.NDArray[np.integer[Any]]
"""Ids (n, L) in the dtype that their file has."""
_PART_BYTES = 1 << 26
_VERSION = 2
_LOOKED_AT = 256
_SIGNED = {"uint64": "int64"}


class TwoParts(NamedTuple):
    """The entries to train on and the held-out ones."""

    train: list[Entry]
    held_out: list[Entry]


def mds_entries(directory: Path) -> list[Entry]:
    """Return the shards of an MDS directory. Raises DataError if it is none of tokens, or a file is missing or cut."""
    path = directory / "index.json"
    content = read_object(path, "copy the directory again whole", DataError)
    try:
        entries = [_mds_entry(directory, entry) for entry in content["shards"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no index of MDS shards ({error!r}); give a directory of MDSWriter") from None
    return [entry for entry in entries if entry["samples"]]


def _mds_entry(directory: Path, found: Entry) -> Entry:
    from streaming.base.format.mds.encodings import is_mds_encoding_safe

    where = f"{directory / 'index.json'}"
    if found["format"] != "mds" or found["version"] != _VERSION:
        raise DataError(f"{where}: format {found['format']} {found['version']}, only mds {_VERSION} is read")
    columns = dict(zip(found["column_names"], found["column_encodings"], strict=True))
    if "tokens" not in columns:
        raise DataError(f"{where}: columns {', '.join(columns)}, none is tokens; text goes to ddk prepare")
    if not columns["tokens"].startswith(("bytes", "ndarray")):
        raise DataError(f"{where}: tokens are {columns['tokens']!r}, bytes or ndarray is read")
    if unsafe := [name for name, encoding in columns.items() if not is_mds_encoding_safe(encoding)]:
        raise DataError(f"{where}: column {unsafe[0]} is pickled, which can run any program; write it without")
    raw, packed = found["raw_data"], found["zip_data"]
    file = directory / raw["basename"]
    if not file.is_file() and packed is not None:
        file, raw = directory / packed["basename"], packed
    if not file.is_file():
        raise DataError(f"shard {file} is missing; copy {directory} again whole")
    if (size := file.stat().st_size) != raw["bytes"]:
        raise DataError(f"shard {file} has {size:,} bytes, its index says {raw['bytes']:,}; copy it again whole")
    return {**found, "path": str(file.resolve()), "first": 0, "in_file": found["samples"]}


def is_compressed(entry: Entry) -> bool:
    """Return True if only the compressed file of a shard is there."""
    return entry["format"] != BIN and Path(entry["path"]).name != Path(entry["raw_data"]["basename"]).name


def cut_samples(entries: Sequence[Entry], held_out: int) -> TwoParts:
    """Cut off the last `held_out` samples, in the middle of a shard where need be."""
    train: list[Entry] = []
    left = sum(entry["samples"] for entry in entries) - held_out
    later: list[Entry] = []
    for entry in entries:
        kept = min(max(left, 0), entry["samples"])
        left -= kept
        if kept:
            train.append({**entry, "samples": kept})
        if kept < entry["samples"]:
            later.append({**entry, "first": kept, "samples": entry["samples"] - kept})
    return TwoParts(train, later)


def bin_pairs(place: Path) -> list[Path]:
    """Return the .idx files of a directory, of a prefix as Megatron-LM has it, or of one file; [] if there are none."""
    if place.is_dir():
        return sorted(place.glob("*.idx"))
    named = [place.with_name(f"{place.name.removesuffix('.bin').removesuffix('.idx')}.idx")]
    return [path for path in named if path.is_file()]


def bin_entries(paths: Sequence[Path], length: int, held_out: int) -> TwoParts:
    """Return the parts of the .bin files, cut into samples of `length` ids.

    The last documents that have `held_out` samples together are held out; the cut is at a document's end.
    """
    parts = TwoParts([], [])
    for path in reversed(paths):
        index = read_document_index(path.resolve())
        check_document_index(index, index.path.with_suffix(".bin"))
        documents = _first_held_out(index, length * max(held_out, 0))
        border = index.begin(documents)
        later = _bin_parts(index, border, index.tokens, length)
        held_out -= sum(entry["samples"] for entry in later)
        parts.held_out[:0] = later
        parts.train[:0] = _bin_parts(index, 0, border, length)
    return parts


def _first_held_out(index: DocumentIndex, tokens: int) -> int:
    """Return the number of the last document from which on there are `tokens` ids; 0 if all are fewer."""
    low, high = 0, index.num_documents
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if index.tokens - index.begin(middle) >= tokens else (low, middle - 1)
    return low


def _bin_parts(index: DocumentIndex, begin: int, end: int, length: int) -> list[Entry]:
    """Return the entries of the complete samples from id `begin` to `end`; what is left fills no sample."""
    size = index.dtype.itemsize
    samples, each = (end - begin) // length, max(1, _PART_BYTES // (length * size))
    path = index.path.with_suffix(".bin")
    parts = []
    for first in range(0, samples, each):
        number = min(each, samples - first)
        place = (begin + first * length) * size
        raw = {"basename": f"{path.stem}.{place}.bin", "bytes": number * length * size}
        shape = {"version": _VERSION, "format": BIN, "column_encodings": [f"{index.dtype.name}:{length}"]}
        parts.append({**shape, "path": str(path), "begin": place, "samples": number, "raw_data": raw})
    return parts


def index_of(entry: Entry) -> tuple[DocumentIndex, int]:
    """Return the documents of a part of a .bin, and the number in the file of its first id."""
    index = read_document_index(Path(entry["path"]).with_suffix(".idx"))
    return index, entry["begin"] // index.dtype.itemsize


def read_rows(entry: Entry, length: int | None) -> tuple[IdRows, str]:
    """Read all ids of an entry, and the xxh64 of its bytes.

    `length` is that of a sample; None: that of the first one. Raises DataError if the file is damaged, or a sample has
    another length.
    """
    if entry["format"] == BIN:
        dtype, own_length = entry["column_encodings"][0].split(":")
        size = np.dtype(dtype).itemsize
        count = entry["raw_data"]["bytes"] // size
        ids: IdRows = np.fromfile(entry["path"], dtype, count, offset=entry["begin"])
        return ids.reshape(-1, int(own_length)), xxhash.xxh64_hexdigest(ids.data)
    content = _content(entry)
    rows = _mds_rows(content, entry, length)
    return rows[entry["first"] : entry["first"] + entry["samples"]], xxhash.xxh64_hexdigest(content)


def _content(entry: Entry) -> bytes:
    """Return an MDS shard's bytes, decompressed. Raises DataError where they are not those of its index."""
    from streaming.base.compression import decompress
    from streaming.base.hashing import get_hash, is_hash

    path = Path(entry["path"])
    content = path.read_bytes()
    described = entry["zip_data" if is_compressed(entry) else "raw_data"]
    for name, known in described["hashes"].items():
        if is_hash(name) and (found := get_hash(name, content)) != known:
            raise DataError(f"shard {path} is damaged: its {name} is {found}, its index says {known}; copy it again")
    if is_compressed(entry):
        try:
            content = decompress(entry["compression"], content)
        except Exception as error:  # every compression has errors of its own
            raise DataError(f"shard {path} cannot be decompressed ({error}); copy it again whole") from None
    return content


def _mds_rows(content: bytes, entry: Entry, length: int | None) -> IdRows:
    """Return all ids (n, L) of an MDS shard's bytes."""
    samples, path = entry["in_file"], entry["path"]
    decode, ends = _decoder_of(entry), _ends(content, entry)

    def sample(number: int) -> npt.NDArray[np.integer[Any]]:
        ids = as_ids(decode(content[ends[number] : ends[number + 1]])["tokens"], entry.get("ids"))
        if not np.issubdtype(ids.dtype, np.integer):
            raise DataError(f"shard {path}: tokens are {ids.dtype}, which are no ids")
        return ids.view(_SIGNED.get(ids.dtype.name, ids.dtype.name))

    first = sample(0)
    due = len(first) if length is None else length
    widths = np.diff(ends)
    if len(entry["column_names"]) == 1 and len(first) == due and (widths == widths[0]).all():
        rows = np.frombuffer(content, np.uint8, int(widths.sum()), int(ends[0])).reshape(samples, -1)
        before = rows.shape[1] - first.nbytes  # the ids are a sample's last bytes; before them stand sizes and shape
        if (rows[:, :before] == rows[0, :before]).all():
            return np.ascontiguousarray(rows[:, before:]).view(first.dtype)
    found = []
    for number in range(samples):
        ids = sample(number)
        if len(ids) != due:
            raise DataError(
                f"shard {path}: sample {number} has {len(ids):,} ids, others have {due:,}; all samples must have one "
                "length: write them again with concatenation (llm-foundry: --concat_tokens)"
            )
        found.append(ids)
    return np.stack(found)


def _ends(content: bytes, entry: Entry) -> npt.NDArray[np.uint32]:
    """Return the places (n + 1,) between the samples of an MDS shard's bytes. Raises DataError if it is cut off."""
    samples, path = entry["in_file"], entry["path"]
    if len(content) < 8 + 4 * samples or int(np.frombuffer(content, "<u4", 1)[0]) != samples:
        raise DataError(f"shard {path} does not hold the {samples:,} samples of its index; copy it again whole")
    ends = np.frombuffer(content, "<u4", samples + 1, 4)
    if int(ends[-1]) != len(content):
        raise DataError(f"shard {path} ends at {int(ends[-1]):,} of {len(content):,} bytes; copy it again whole")
    return ends


def _decoder_of(entry: Entry) -> Any:
    """Return the function from a sample's bytes to its columns."""
    return _decoder(tuple(entry["column_names"]), tuple(entry["column_encodings"]), tuple(entry["column_sizes"]))


@cache
def _decoder(names: tuple[str, ...], encodings: tuple[str, ...], sizes: tuple[int | None, ...]) -> Any:
    """Return streaming's own function from a sample's bytes to its columns."""
    from streaming.base.format.mds import MDSReader

    options: dict[str, Any] = {"compression": None, "hashes": [], "samples": 1, "size_limit": None, "zip_data": None}
    columns = {"column_names": list(names), "column_encodings": list(encodings), "column_sizes": list(sizes)}
    return MDSReader(dirname="", split=None, raw_data=None, **columns, **options).decode_sample  # type: ignore[arg-type]


def ids_dtype(entry: Entry) -> str:
    """Return the dtype of the ids that a column of bytes holds: int64 if the upper halves are those of ids, else int32.

    Raises DataError if a sample's bytes are no whole number of either.
    """
    content = _content(entry)
    decode, ends = _decoder_of(entry), _ends(content, entry)
    columns = [decode(content[begin:end])["tokens"] for begin, end in pairwise(ends[: _LOOKED_AT + 1].tolist())]
    if odd := next((len(values) for values in columns if len(values) % 4 or not values), None):
        raise DataError(f"shard {entry['path']}: a sample of {odd} bytes holds no int32 or int64")
    halves = np.frombuffer(b"".join(columns), "<i4")
    is_long = all(len(values) % 8 == 0 for values in columns) and np.isin(halves[1::2], (0, -1)).all()
    return "int64" if is_long else "int32"
