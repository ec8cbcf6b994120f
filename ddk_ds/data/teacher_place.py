"""Where a cache of a teacher lies: a directory that all ranks see, or an address, behind the node's cache of shards.

A part is written on a local disk and appears whole: a directory by its renaming, an address by the file SAMPLES_FILE,
which is put there after all others. What a kill has left of one counts for nothing.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import Protocol

from ddk_ds.config import Data
from ddk_ds.config.paths import is_address
from ddk_ds.data.cache import WRITING, CachedStore, cache_options
from ddk_ds.data.mds import SplitIndex
from ddk_ds.data.remote import Missing
from ddk_ds.data.store import LocalStore, Store
from ddk_ds.data.uploads import Uploader
from ddk_ds.errors import ConfigError, DataError
from ddk_ds.files import PARTIAL, is_leftover, nearest_existing, new_directory, remove_leftovers, write_text, written

PARTS = "parts"
SAMPLES_FILE = "samples.json"
_DEAD_AFTER_S = 3600.0


class Place(Protocol):
    """Files of a cache, which other processes add at the same time and nobody changes."""

    location: str
    store: Store
    """Reads shards, and small files that do not change."""

    def begin(self) -> None:
        """Prepare the place for parts. Raises CheckpointError or DataError if they cannot be written."""

    def give_up_when(self, condition: Callable[[], bool]) -> None:
        """Let a store's failure not be waited for any longer when `condition` is True."""

    def free_bytes(self) -> int | None:
        """Return the free space; None if it is not known."""

    def is_empty(self) -> bool:
        """Return True if nothing is there, or only what a kill has left."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file as it is now; None if it is not there. Raises DataError."""

    def write(self, name: str, text: str) -> None:
        """Write or replace a small file. Raises CheckpointError."""

    def parts(self) -> list[str]:
        """Return the names of the parts."""

    def reading(self, index: SplitIndex) -> SplitIndex:
        """Return a part's index as its samples are read by."""

    def new_part(self, name: str) -> AbstractContextManager[Path]:
        """Return a context: an empty local directory, which is the part `name` when the block ends.

        Raises CheckpointError if it cannot be written. After an error in the block there is no such part.
        """


class LocalPlace:
    """A directory, on this machine or on a shared file system."""

    def __init__(self, path: Path) -> None:
        self.location = str(path)
        self.store: Store = LocalStore(path)
        self._path = path

    def begin(self) -> None:
        with written(self._path):
            (self._path / PARTS).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._path / PARTS).close()
            _remove_dead(self._path / PARTS)

    def give_up_when(self, condition: Callable[[], bool]) -> None:
        """Do nothing: there is no store to wait for."""

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(nearest_existing(self._path)).free

    def is_empty(self) -> bool:
        return not self._path.is_dir() or all(is_leftover(other) for other in self._path.iterdir())

    def read(self, name: str) -> bytes | None:
        try:
            return (self._path / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{self._path / name} cannot be read: {error.strerror}; mend that") from None

    def write(self, name: str, text: str) -> None:
        with written(self._path):
            self._path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self._path)
            write_text(self._path / name, text)

    def parts(self) -> list[str]:
        folder = self._path / PARTS
        paths = folder.iterdir() if folder.is_dir() else ()
        return sorted(path.name for path in paths if path.is_dir() and not path.name.startswith("."))

    def reading(self, index: SplitIndex) -> SplitIndex:
        """Return the index without the shards' hashes, since each sample has its own.

        A rank reads some samples of a shard. To verify it whole, every rank would read all of the cache: eight times
        the bytes on a node of eight.
        """
        return replace(index, shards=[replace(shard, xxh64=None) for shard in index.shards])

    @contextmanager
    def new_part(self, name: str) -> Iterator[Path]:
        with written(self._path), new_directory(self._path / PARTS / name) as directory:
            yield directory


class RemotePlace:
    """An address below which files are put and listed; shards are read through the cache `data.cache_dir`."""

    def __init__(self, location: str, data: Data) -> None:
        options = cache_options(data)
        self.location = location.rstrip("/")
        below = f".teacher-{hashlib.sha256(self.location.encode()).hexdigest()[:16]}"  # no domain's name begins so
        self._cached = CachedStore(self.location, options, below)
        self.store: Store = self._cached
        self._written = options.directory / WRITING / token_hex(8)
        times = {"timeout_s": options.timeout_s, "patience_s": options.patience_s}
        self._uploader = Uploader(self.location, self._written, **times)

    def begin(self) -> None:
        self.write("writable", "")

    def give_up_when(self, condition: Callable[[], bool]) -> None:
        self._cached.fetcher.give_up = self._uploader.give_up = condition

    def free_bytes(self) -> int | None:
        return None

    def is_empty(self) -> bool:
        return not self._uploader.names("")

    def read(self, name: str) -> bytes | None:
        try:
            return self.store.read(name, fresh=True)
        except Missing:
            return None

    def write(self, name: str, text: str) -> None:
        with written(self._written):
            self._written.mkdir(parents=True, exist_ok=True)
            (self._written / name).write_text(text, encoding="utf-8")
        self._uploader.upload(name)

    def parts(self) -> list[str]:
        names = (name.split("/") for name in self._uploader.names(f"{PARTS}/"))
        return sorted(name[1] for name in names if name[2:] == [SAMPLES_FILE])

    def reading(self, index: SplitIndex) -> SplitIndex:
        """Return the index as it is: a shard that was fetched wrongly is fetched again."""
        return index

    @contextmanager
    def new_part(self, name: str) -> Iterator[Path]:
        directory = self._written / PARTS / name
        try:
            with written(self._written):
                directory.mkdir(parents=True)
                yield directory
            files = sorted(directory.iterdir(), key=lambda path: path.name == SAMPLES_FILE)
            for file in files:
                self._uploader.upload(f"{PARTS}/{name}/{file.name}")
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def open_place(location: str, data: Data) -> Place:
    """Return the place of a cache; for an address `data` says where shards are kept on this node."""
    return RemotePlace(location, data) if is_address(location) else LocalPlace(Path(location))


def check_room(place: Place, num_bytes: float) -> None:
    """Raise ConfigError if samples of up to so many bytes may not fit."""
    free = place.free_bytes()
    if free is not None and num_bytes > free:
        raise ConfigError(
            f"teacher.cache.path {place.location} has {free / 1e9:,.3g} GB free, and the samples to compute take up to "
            f"{num_bytes / 1e9:,.3g} GB: make room, give another directory, or lower --samples"
        )


def _remove_dead(folder: Path) -> None:
    """Delete parts that killed processes have begun."""
    for path in folder.glob(f"{PARTIAL}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _DEAD_AFTER_S:
                shutil.rmtree(path, ignore_errors=True)
