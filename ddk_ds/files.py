"""Files and directories that appear complete or not at all, and the size and hash of a file on the disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

import xxhash

from ddk_ds.errors import DISK_FULL, CheckpointError, UserError

PARTIAL = ".partial-"
"""Prefix of the directories in which directories are written; nothing that has it is complete."""
_LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]+\.partial")
# No live process takes this long to write a small file; clocks of nodes differ by less.
_DEAD_AFTER_S = 3600.0
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
    file or the new one. After an error in the block the partial file is removed and `path` is as it was; what a killed
    process left is removed by the next one that writes the same `path`, an hour later or more.
    """
    remove_leftovers(path.parent, path.name)
    partial = path.with_name(f".{path.name}.{token_hex(4)}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def is_leftover(path: Path) -> bool:
    """Return True if `path` is a partial file of `new_file`: of a process that writes, or that was killed."""
    return _LEFTOVER.fullmatch(path.name) is not None and path.is_file()


def remove_leftovers(directory: Path, name: str | None = None, *, age_s: float = _DEAD_AFTER_S) -> None:
    """Delete partial files of `new_file` that killed processes left in `directory`, if there is one.

    Args:
        name: the file that they were to become; None: any.
        age_s: seconds since the last write after which their process counts as dead.
    """
    for path in directory.glob(".*.partial"):
        found = _LEFTOVER.fullmatch(path.name)
        if found is not None and name in (None, found[1]):
            try:
                if time.time() - path.stat().st_mtime >= age_s:
                    path.unlink()
            except OSError:  # renamed or removed by its own process
                pass


@contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory on the disk of `path`; when the block ends, it is renamed to `path`.

    Everything in it is on the disk before the rename. After an error in the block it is removed and `path` is as it
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
                    sync(file)
            sync_directories(new)
            if replace:
                _put(new, path)
            else:
                new.rename(path)
            sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def partial_path(path: Path) -> Path:
    """Return the place, next to `path`, in which the directory `path` is written."""
    return path.with_name(f"{PARTIAL}{path.name}")


def _put(new: Path, path: Path) -> None:
    """Rename `new` to `path`, and delete what was there; also what a process left that was killed in between."""
    old = path.with_name(f".replaced-{path.name}")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a directory, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems have no fsync of a directory
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def sync_directories(root: Path) -> None:
    """Wait until the names in `root` and in all directories below are on the disk. Raises OSError."""
    for directory, _, _ in os.walk(root, topdown=False):
        sync(Path(directory))


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as CheckpointError: a run cannot write `path`, why not, and what to do."""
    try:
        yield
    except OSError as error:
        then = "start the same command again: the run continues from its newest checkpoint"
        raise unwritable(path, error, then) from error


def unwritable(path: Path | str, error: OSError, then: str) -> CheckpointError:
    """Return the error that `path` cannot be written: why not, and what to do `then`."""
    room = "make room, then " if error.errno in DISK_FULL else ""
    return CheckpointError(f"{path} cannot be written: {error.strerror or error}; {room}{then}")


def read_json(path: Path, mend: str, error: type[UserError] = CheckpointError) -> Any:
    """Return the content of a JSON file. Raises `error`, which ends with how to `mend` it, if it cannot be read."""
    try:
        text = path.read_bytes()
        return json.loads(text)
    except OSError as failure:
        reason = f"cannot be read: {failure.strerror or failure}"
    except (ValueError, RecursionError):
        reason = "is damaged: it is no JSON" if text.strip(b"\0 \n") else "is damaged: it is empty"
    raise error(f"{path} {reason}; {mend}")


def read_object(path: Path, mend: str, error: type[UserError] = CheckpointError) -> dict[str, Any]:
    """Return the object in a JSON file. Raises `error`, which ends with how to `mend` it, if there is none."""
    content = read_json(path, mend, error)
    if not isinstance(content, dict):
        raise error(f"{path} is damaged: it holds {type(content).__name__} where an object is due; {mend}")
    return content


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of plain JSON with its own hash at the key "xxh64"."""
    return {**record, "xxh64": own_hash(record)}


def unsealed(content: bytes, name: str) -> dict[str, Any]:
    """Return the record that `sealed` has made, without the hash, from the content of its file.

    Raises ValueError, with the file's `name`, where it is not whole and as it was written.
    """
    record = json.loads(content)
    expected, found = record.pop("xxh64", None), own_hash(record)
    if found != expected:
        raise ValueError(f"the xxh64 of what {name} holds is {found}, it says {expected}")
    return dict(record)


def own_hash(record: Any) -> str:
    """Return the hash (hexadecimal) of plain JSON, whatever the order of its keys."""
    return xxhash.xxh64_hexdigest(json.dumps(record, sort_keys=True))


def size_and_xxh64(path: Path, begin: int = 0, length: int | None = None) -> tuple[int, str]:
    """Return the number of bytes and the xxh64 (hexadecimal) of a file, read from the disk. Raises OSError.

    With `length` of at most that many bytes, those from `begin` on.
    """
    digest, num_bytes = xxhash.xxh64(), 0
    with path.open("rb", buffering=0) as stream:
        stream.seek(begin)
        while block := stream.read(_BLOCK_BYTES if length is None else min(_BLOCK_BYTES, length - num_bytes)):
            digest.update(block)
            num_bytes += len(block)
    return num_bytes, digest.hexdigest()


def nearest_existing(path: Path) -> Path:
    """Return `path` if it exists, else the nearest of its parents that does."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())
