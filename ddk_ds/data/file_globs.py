"""Globs over this machine's files, which follow symbolic links and leave nothing out unsaid.

Python's own leave out directories: pathlib's `**` those that are reached by a link, and all of them those that cannot
be listed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from ddk_ds.errors import DataError

_Identity = tuple[int, int]


def find_files(base: Path, pattern: str) -> Iterator[Path]:
    """Yield the paths below `base` that a glob matches, some more than once; `**` is any number of directories.

    A link to a directory above itself is not followed again.

    Raises:
        DataError: a directory cannot be listed.
        ValueError: the pattern is empty, absolute, or has `**` inside a name.
    """
    parts = PurePosixPath(pattern).parts
    if not parts or parts[0] == "/":
        raise ValueError(f"unacceptable pattern: {pattern!r}")
    if any("**" in part and part != "**" for part in parts):
        raise ValueError("'**' can only be an entire path component")
    if base.is_dir():
        yield from _find(base, parts, {_identity(base)})


def _find(path: Path, parts: Sequence[str], above: set[_Identity]) -> Iterator[Path]:
    """Yield what the remaining parts of a pattern match in the directory `path`; `above` holds it and its parents."""
    if not parts:
        yield path
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        yield from _find(path, rest, above)
        for entry in _entries(path):
            if _is_dir(entry) and (identity := _identity(path / entry.name)) not in above:
                yield from _find(path / entry.name, parts, {*above, identity})
    elif any(letter in first for letter in "*?["):
        for entry in _entries(path):
            if fnmatchcase(entry.name, first) and (not rest or _is_dir(entry)):
                yield from _find(path / entry.name, rest, above)
    elif (path / first).exists() or (path / first).is_symlink():
        yield from _find(path / first, rest, above)


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    """Return what is in a directory, sorted; without a look at each entry, which takes long on a cluster's disks."""
    try:
        with os.scandir(directory) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except NotADirectoryError:
        return []
    except OSError as error:
        raise DataError(
            f"{directory} cannot be listed ({error.strerror}): make it readable, or name the others in the recipe"
        ) from error


def _is_dir(entry: os.DirEntry[str]) -> bool:
    """Return True for a directory and for a link to one; pathlib takes a link to itself for neither."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and Path(entry.path).is_dir())


def _identity(path: Path) -> _Identity:
    status = path.stat()
    return status.st_dev, status.st_ino
