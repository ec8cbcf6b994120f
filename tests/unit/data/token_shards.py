"""Token shards as other programs write them: llm-foundry's MDS, and .bin and .idx by Megatron-LM's layout."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_mds(
    directory: Path, samples: Any, encoding: str = "bytes", dtype: str = "int64", limit: int = 4096, **options: Any
) -> Path:
    """Write samples as llm-foundry's converters do: a column `tokens`, no hashes unless they are asked for."""
    with MDSWriter(out=str(directory), columns={"tokens": encoding}, size_limit=limit, **options) as writer:
        for sample in samples:
            ids = np.asarray(sample).astype(dtype)
            writer.write({"tokens": ids.tobytes() if encoding == "bytes" else ids})
    return directory


def write_megatron(
    prefix: Path, documents: Sequence[Sequence[Any]], dtype: str = "uint16", modes: bytes = b"", split: int = 1
) -> Path:
    """Write documents as Megatron-LM's IndexedDatasetBuilder does; `split`: sequences of each document."""
    sequences = [part for document in documents for part in np.array_split(np.asarray(document), split)]
    with prefix.with_suffix(".bin").open("wb") as stream:
        for sequence in sequences:
            stream.write(sequence.astype(dtype).tobytes())
    size = np.dtype(dtype).itemsize
    places, at = [], 0
    for sequence in sequences:
        places.append(at)
        at += len(sequence) * size
    borders = list(range(0, len(sequences) + 1, split))
    with prefix.with_suffix(".idx").open("wb") as stream:
        stream.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype]))
        stream.write(struct.pack("<QQ", len(sequences), len(borders)))
        stream.write(struct.pack(f"<{len(sequences)}i", *map(len, sequences)))
        stream.write(struct.pack(f"<{len(sequences)}q", *places))
        stream.write(struct.pack(f"<{len(borders)}q", *borders) + modes)
    return prefix
