"""The place of prepared data: a directory, or a remote directory of which each node keeps a cache (cache.py).

A process compares a shard with the hash in its index before it reads the first sample, and again when the file has
changed since: a flipped byte must not become a token.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ddk_ds.errors import DataError
from ddk_ds.files import size_and_xxh64

AGAIN = "prepare the data again, or copy it again whole"


@dataclass(frozen=True)
class Shard:
    """One shard file as its index describes it; `name` is its path below the root of the data.

    An adopted shard lies at `path` instead, an absolute one or one from the root; with `begin` it is the `num_bytes`
    bytes of that file from there on.
    """

    name: str
    num_bytes: int
    xxh64: str | None
    path: str | None = None
    begin: int | None = None

    @property
    def domain(self) -> str:
        """Name of the domain: the first directory of `name`."""
        return self.name.partition("/")[0]

    def check_size(self, path: Path) -> None:
        """Raise Damaged, or FileNotFoundError, if the file at `path` cannot hold the shard."""
        found, due = path.stat().st_size, self.num_bytes + (self.begin or 0)
        if found < due or (found > due and self.begin is None):
            raise Damaged(f"shard {path} has {found:,} bytes, its index says {due:,} (domain {self.domain!r}); {AGAIN}")


class Damaged(DataError):
    """A shard whose size or content differs from its index."""


class Store(Protocol):
    """Files of one prepared data directory. It can be pickled and forked: no open file, no lock object."""

    location: str
    """The root as the user wrote it: a path or an address."""

    def read(self, name: str, *, fresh: bool = False) -> bytes:
        """Return the content of a small file, domains.json or an index; `fresh`: not from a cache.

        Raises FileNotFoundError or DataError.
        """

    def check(self, directory: str, shards: list[Shard]) -> None:
        """Raise DataError if the directory lacks one of these shards, as far as can be seen without reading them."""

    def shard(self, shard: Shard) -> Path:
        """Return the path of a verified local copy, which another process can evict at any time. Raises DataError."""


class Verified:
    """The shard files that this process has verified, with their modification time, size and inode at that time."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int, int]] = {}

    def check(self, shard: Shard, path: Path) -> None:
        """Verify the file unless it is unchanged since the last time. Raises FileNotFoundError, Damaged."""
        status = path.stat()
        signature = (status.st_mtime_ns, status.st_size, status.st_ino)
        if self._seen.get(shard.name) != signature:
            verify(shard, path)
            self._seen[shard.name] = signature


def verify(shard: Shard, path: Path) -> None:
    """Compare a file's size and xxh64 with its index.

    Raises:
        FileNotFoundError: there is no such file.
        Damaged: names the file, the domain, and the expected and the actual value.
    """
    shard.check_size(path)
    if shard.xxh64 is None:
        return
    _, digest = size_and_xxh64(path, shard.begin or 0, shard.num_bytes)
    if digest != shard.xxh64:
        raise Damaged(
            f"shard {path} of domain {shard.domain!r} is damaged: its xxh64 is {digest}, its index says "
            f"{shard.xxh64}; {AGAIN}"
        )


class LocalStore:
    """A prepared directory on this machine or on a shared file system."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.location = str(root)
        self._verified = Verified()

    def read(self, name: str, *, fresh: bool = False) -> bytes:
        return (self.root / name).read_bytes()

    def check(self, directory: str, shards: list[Shard]) -> None:
        for shard in shards:
            file = self._file(shard)
            if not file.is_file():
                raise DataError(f"shard {file} is missing; {AGAIN}")
            shard.check_size(file)
        known = {os.path.basename(shard.name) for shard in shards}
        extra = sorted(file.name for file in (self.root / directory).glob("shard.*") if file.name not in known)
        if extra:
            raise DataError(
                f"{self.root / directory} holds {extra[0]}, which its index.json does not list: shards of two "
                f"preparations are mixed; {AGAIN}"
            )

    def shard(self, shard: Shard) -> Path:
        path = self._file(shard)
        try:
            self._verified.check(shard, path)
        except FileNotFoundError:
            raise DataError(f"shard {path} of domain {shard.domain!r} is gone; {AGAIN}") from None
        return path

    def _file(self, shard: Shard) -> Path:
        return self.root / (shard.path or shard.name)
