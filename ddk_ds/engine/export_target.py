"""Where an export goes: it appears whole or not at all, and takes the place of an export of ours alone.

Each holds ddk_ds_export.json with its files: one that has been changed, such as a card that was filled in, is known.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddk_ds.errors import CheckpointError
from ddk_ds.files import nearest_existing, size_and_xxh64

NOTE = "ddk_ds_export.json"
_LOCK = ".lock"


def check_target(directory: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError where `directory` is there and may not be replaced.

    An export as we wrote it may be. With `overwrite` any model's directory.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"--out {directory} exists and is no model's directory: name another")
    changed = _changed(directory)
    if changed and not overwrite:
        raise CheckpointError(
            f"--out {directory} exists, and {changed}: name another, or replace all of it with --overwrite"
        )


def check_room(directory: Path, needed_bytes: int) -> None:
    """Raise CheckpointError where the disk of `directory` has less than `needed_bytes` free."""
    place = nearest_existing(directory)
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise CheckpointError(
            f"--out {directory}: the export takes {needed_bytes:,} bytes, {place} has {free:,} free: make room, or "
            "name another disk"
        )


@contextmanager
def whole(directory: Path, about: dict[str, Any]) -> Iterator[Path]:
    """A directory to write to, which becomes `directory` at the end, and is gone after an error.

    `about` goes into the note beside the files. Raises CheckpointError where another process writes the same.
    """
    partial = directory.with_name(f".partial-{directory.name}")
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{directory} is being written by another process: wait for it") from None
        except OSError:  # a file system without locks
            pass
        try:
            for left in partial.iterdir():  # by one that was killed
                if left.name != _LOCK:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
            (partial / NOTE).write_text(json.dumps({**about, "files": _files(partial)}, indent=1))
            (partial / _LOCK).unlink()
            _put(partial, directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _put(partial: Path, directory: Path) -> None:
    if not directory.exists():
        partial.rename(directory)
        return
    old = directory.with_name(f".replaced-{directory.name}")
    shutil.rmtree(old, ignore_errors=True)
    directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old)


def _files(directory: Path) -> dict[str, list[int | str]]:
    """Bytes of every file, and the xxh64 of those that are not weights: whoever changes weights changes others too."""
    found: dict[str, list[int | str]] = {}
    for path in sorted(directory.iterdir()):
        if path.name not in (NOTE, _LOCK):
            weights = path.suffix == ".safetensors"
            found[path.name] = [path.stat().st_size] if weights else list(size_and_xxh64(path))
    return found


def _changed(directory: Path) -> str:
    """What tells that this is not an export as we wrote it, or ""."""
    try:
        noted = json.loads((directory / NOTE).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "is no export of ours"
    found = {} if any(path.is_dir() for path in directory.iterdir()) else _files(directory)
    differing = sorted(name for name in {**noted, **found} if noted.get(name) != found.get(name))
    return f"{differing[0]} in it is not as we wrote it" if differing else ""
