"""Documents in Megatron-LM's `.bin` and `.idx`: all ids in a row, and where each document begins.

The layout is that of megatron/core/datasets/indexed_dataset.py: the .idx has, little-endian, the magic, the version (8
bytes), the code of the ids' dtype (1 byte), the number n of sequences and the number m of entries of documents (8 bytes
each), n lengths (int32, in ids), n places (int64, in bytes of the .bin), and m numbers (int64) of the sequences with
which documents begin, the last one n. Multimodal data have n bytes more.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddk_ds.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_CHECKED = 1 << 20


@dataclass(frozen=True)
class DocumentIndex:
    """The content of an .idx file, mapped and not read: `places` (n,) bytes, `documents` (m,) numbers of sequences."""

    path: Path
    dtype: np.dtype[np.signedinteger[Any] | np.unsignedinteger[Any]]
    sizes: npt.NDArray[np.int32]
    places: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]

    @property
    def num_documents(self) -> int:
        """Return the number of documents, empty ones too."""
        return len(self.documents) - 1

    @property
    def tokens(self) -> int:
        """Return the number of ids in the .bin."""
        return (int(self.places[-1]) // self.dtype.itemsize + int(self.sizes[-1])) if len(self.places) else 0

    def begin(self, document: int) -> int:
        """Return the number of the first id of a document; that of the one after the last is `tokens`."""
        sequence = int(self.documents[document])
        return self.tokens if sequence == len(self.places) else int(self.places[sequence]) // self.dtype.itemsize

    def lengths(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Return the number of ids from `begin` to `end` that each document has there, (d,); empty ones are none."""
        return np.diff(np.concatenate([[begin], self._borders(begin, end), [end]]))

    def counts(self, begin: int, samples: int, length: int) -> npt.NDArray[np.int64]:
        """Return the number of documents (samples,) in each sample of `length` ids; the first begins at `begin`."""
        borders = self._borders(begin, begin + samples * length) - begin
        return 1 + np.bincount(borders[borders % length != 0] // length, minlength=samples)

    def _borders(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Return the places between `begin` and `end`, each once, at which a document begins."""
        # Bisection reads some numbers of a file that can be of gigabytes; numpy's would copy it, for it is not aligned.
        size = self.dtype.itemsize
        first, last = bisect_right(self.places, begin * size), bisect_left(self.places, end * size)
        sequences = self.documents[bisect_left(self.documents, first) : bisect_left(self.documents, last)]
        return np.unique(self.places[sequences] // size)


@lru_cache(8)
def read_document_index(path: Path) -> DocumentIndex:
    """Map an .idx file. Raises DataError where it is none, is cut off, or is of data that this program cannot read."""
    try:
        with path.open("rb") as stream:
            header = stream.read(_HEADER.size)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give the pair of .bin and .idx") from None
    if len(header) < _HEADER.size or header[:9] != _MAGIC:
        raise DataError(
            f"{path} is no .idx of Megatron-LM (it begins with {header[:9]!r}); give the pair that it wrote"
        )
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise DataError(f"{path} has version {version} and dtype {code}: only version 1 with whole numbers is read")
    due = _HEADER.size + 12 * sequences + 8 * documents
    if (found := path.stat().st_size) == due + sequences:
        raise DataError(f"{path} is of multimodal data (it has modes of sequences); give data of text alone")
    if found != due or documents < 1:
        raise DataError(f"{path} has {found:,} bytes, its header says {due:,}; copy it again whole")
    content = np.asarray(np.memmap(path, np.uint8, "r"))
    sizes, places, starts = (
        content[begin:end].view(dtype)
        for begin, end, dtype in (
            (_HEADER.size, _HEADER.size + 4 * sequences, "<i4"),
            (_HEADER.size + 4 * sequences, _HEADER.size + 12 * sequences, "<i8"),
            (_HEADER.size + 12 * sequences, due, "<i8"),
        )
    )
    return DocumentIndex(path, np.dtype(_DTYPES[code]), sizes, places, starts)


def check_document_index(index: DocumentIndex, binary: Path) -> None:
    """Raise DataError if the .bin is not as long as its .idx says, or the sequences do not lie in it in a row."""
    end = 0
    for first in range(0, len(index.places), _CHECKED):
        sizes = np.array(index.sizes[first : first + _CHECKED], np.int64) * index.dtype.itemsize
        places = end + np.cumsum(sizes) - sizes
        if (sizes < 0).any() or not np.array_equal(index.places[first : first + _CHECKED], places):
            raise DataError(f"{index.path} is damaged: its sequences do not lie in a row; write the pair again")
        end += int(sizes.sum())
    documents = index.documents
    in_order = all(
        bool((np.diff(documents[first : first + _CHECKED + 1]) >= 0).all())
        for first in range(0, len(documents), _CHECKED)
    )
    if documents[0] != 0 or documents[-1] != len(index.places) or not in_order:
        raise DataError(f"{index.path} is damaged: its documents are not all sequences in a row; write the pair again")
    try:
        found = binary.stat().st_size
    except OSError as error:
        raise DataError(f"{binary} cannot be read: {error.strerror}; give the pair of .bin and .idx") from None
    if found != end:
        raise DataError(f"{binary} has {found:,} bytes, {index.path.name} says {end:,}; copy it again whole")
