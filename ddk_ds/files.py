"""Files and directories that appear complete or not at all, and the size and hash of a file on the disk."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from ddk_ds.errors import UserError

PARTIAL = ".partial-"
"""Prefix of the directories in which directories are written; nothing that has it is complete."""
_BLOCK_BYTES = 1 << 22


def write_text(path: Path, text: str) -> None:
    """Write a small file (UTF-8): a reader finds the old text or the new one, never a part."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_lines(path: str, key: str) -> list[str]:
    """Return the lines of a text file that are not blank. Raises UserError, naming `key`, if it cannot be read."""
    try:
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise UserError(f"{key} {path}: cannot be read: {reason}") from None


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the path of a partial file next to `path`; when the block ends, it takes the place of `path`.

    The block writes the partial file. Its content is on the disk before the rename, so that a power cut leaves the old
    file or the new one. After an error in the block the partial file is removed and `path` is as it was; a process that
    is killed leaves the partial file, whose name begins with a dot.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory on the disk of `path`; when the block ends, it is renamed to `path`.

    Every file in it is on the disk before the rename. After an error in the block it is removed and `path` is as it
    was; what a killed process left is removed by the next one that writes the same `path`.

    Args:
        replace: replace what `path` holds. Without it `path` must be missing or empty.

    Raises:
        UserError: another process is writing `path`.
        OSError: `path` cannot be written, or holds something that may not be replaced.
    """
    partial = partial_path(path)
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path} is being written by another process: wait for it") from None
        except OSError:  # a file system without locks
            pass
        try:
            new = partial / path.name
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            yield new
            for file in new.rglob("*"):
                if file.is_file():
                    _sync(file)
            if replace and path.exists():
                _exchange(new, path)
            else:
                new.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def partial_path(path: Path) -> Path:
    """Return the place, next to `path`, in which the directory `path` is written."""
    return path.with_name(f"{PARTIAL}{path.name}")


def _exchange(new: Path, path: Path) -> None:
    old = path.with_name(f".replaced-{path.name}")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    new.rename(path)
    shutil.rmtree(old)


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def size_and_xxh64(path: Path) -> tuple[int, str]:
    """Return the number of bytes and the xxh64 (hexadecimal) of a file, read from the disk. Raises OSError."""
    digest, num_bytes = xxhash.xxh64(), 0
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return num_bytes, digest.hexdigest()


def nearest_existing(path: Path) -> Path:
    """Return `path` if it exists, else the nearest of its parents that does."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())
