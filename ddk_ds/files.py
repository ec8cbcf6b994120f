"""Small files that are whole or not there, and what a large one holds."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

_BLOCK_BYTES = 1 << 22


def size_and_xxh64(path: Path) -> tuple[int, str]:
    """Bytes and xxh64 of a file, as they can be read back. Raises OSError."""
    digest, num_bytes = xxhash.xxh64(), 0
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return num_bytes, digest.hexdigest()


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest of its parents that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def write_text(path: Path, text: str) -> None:
    """Write a small file by way of a temporary name on the same disk: a reader finds the old text or the new."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
