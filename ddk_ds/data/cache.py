"""A node's cache of a remote data directory: each shard is fetched once, verified, and evicted when space is short.

All processes of a node share the cache through its files alone. A shard is fetched under a lock of its own, for which
the other processes wait; space is found under one lock for all shards. The kernel frees the locks of a process that
was killed, and its half-written files are removed by the next job that uses the cache alone.

    <cache_dir>/cache.json      the remote's address and the limit
    <cache_dir>/data/...        files as the remote has them; the access time is the last use
    <cache_dir>/fetching/...    files that are being fetched, and the space reserved for them
    <cache_dir>/writing/...     files that are written here and then put on a store
    <cache_dir>/locks/...

One thread on each node, the prefetcher, fetches shards before the training reads their first sample.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ddk_ds.config import Data
from ddk_ds.data.remote import Fetcher
from ddk_ds.data.store import Damaged, LocalStore, Shard, Store, Verified
from ddk_ds.errors import DISK_FULL, ConfigError, DataError, UserError
from ddk_ds.files import read_object, write_text

MIN_SHARDS = 4
WRITING = "writing"
_GB = 10**9
# Least seconds between two marks of a shard's use by one process.
_MARK_S = 2.0


@dataclass(frozen=True)
class CacheOptions:
    """Options of a cache, which are keys of the configuration's section data."""

    directory: Path
    limit_gb: float | None
    timeout_s: float
    patience_s: float


class CachedStore:
    """A `store.Store` of a remote directory, with a cache on this node."""

    def __init__(self, location: str, options: CacheOptions, below: str = "") -> None:
        """Make it; stores with one directory and different names `below` share its limit."""
        self.location = location
        self.options = options
        self.fetcher = Fetcher(location, timeout_s=options.timeout_s, patience_s=options.patience_s)
        self._all = options.directory / "data"
        self._data, self._below = self._all / below, below
        self._fetching = options.directory / "fetching"
        self._locks = options.directory / "locks"
        self._verified = Verified()
        self._marked: dict[str, float] = {}
        for directory in (self._data, self._fetching, self._locks):
            _make(directory)

    @property
    def limit_bytes(self) -> int | None:
        """Maximum number of bytes of all shards, including those that are being fetched; None if there is no limit."""
        return None if self.options.limit_gb is None else int(self.options.limit_gb * _GB)

    def read(self, name: str, *, fresh: bool = False) -> bytes:
        path, wanted_since = self._data / name, time.monotonic()
        with self._lock(name):
            if fresh or not path.is_file():
                self._download(name, self._fetching / self._key(name), path, wanted_since)
            return path.read_bytes()

    def check(self, directory: str, shards: list[Shard]) -> None:
        if outside := [shard for shard in shards if shard.path is not None]:
            raise ConfigError(
                f"data.cache_dir is set, and the data at {self.location} were adopted: their shards lie elsewhere "
                f"({outside[0].path}) and are read there; leave data.cache_dir out, or adopt them with --copy"
            )
        largest = max((shard.num_bytes for shard in shards), default=0)
        if self.limit_bytes is not None and self.limit_bytes < MIN_SHARDS * largest:
            raise ConfigError(
                f"data.cache_limit_gb is {self.options.limit_gb:g}: it must hold {MIN_SHARDS} shards of "
                f"{largest / _GB:.3g} GB ({directory}); give {MIN_SHARDS * largest / _GB:.3g} or more"
            )

    def shard(self, shard: Shard) -> Path:
        path = self._data / shard.name
        while True:
            try:
                self._verified.check(shard, path)
                self._mark(shard, path)
                return path
            except (FileNotFoundError, Damaged):
                self._fetch(shard, path)

    def holds(self, shard: Shard) -> bool:
        """Return True if the cache has the shard, verified or not."""
        return (self._data / shard.name).is_file()

    def _mark(self, shard: Shard, path: Path) -> None:
        now = time.monotonic()
        if now - self._marked.get(shard.name, -_MARK_S) >= _MARK_S:
            # The modification time stays: it tells a process that the file is still the one that it verified.
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
            self._marked[shard.name] = now

    def _fetch(self, shard: Shard, path: Path) -> None:
        # The wait for another process that is patient is part of this one's patience.
        wanted_since = time.monotonic()
        with self._lock(shard.name):
            try:
                # Another process may have fetched it while this one waited for the lock.
                self._verified.check(shard, path)
                return
            except Damaged:
                path.unlink()
            except FileNotFoundError:
                pass
            key = self._key(shard.name)
            reserved = self._fetching / f"{key}.space"
            self._make_room(reserved, shard.num_bytes)
            try:
                self._download(shard.name, self._fetching / key, path, wanted_since, shard)
            finally:
                reserved.unlink(missing_ok=True)

    def _download(self, name: str, partial: Path, path: Path, wanted_since: float, shard: Shard | None = None) -> None:
        _make(path.parent)
        try:
            self.fetcher.fetch(name, partial, shard, wanted_since)
            partial.replace(path)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise DataError(
                f"data.cache_dir {self.options.directory}: the disk is full while {name} of {self.location} is "
                "fetched; free space there, or lower data.cache_limit_gb"
            ) from None
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, reserved: Path, num_bytes: int) -> None:
        """Evict the least recently used shards until `num_bytes` more fit; the file `reserved` reserves that space."""
        with _locked(self._locks / _hash("space")):
            if self.limit_bytes is not None:
                reservations = [size for _, size, _ in _files(self._fetching, ".space")]
                files = sorted(_files(self._all, ".mds"))
                excess = sum(reservations) + sum(size for _, size, _ in files) + num_bytes - self.limit_bytes
                for _, size, path in files:
                    if excess <= 0:
                        break
                    path.unlink(missing_ok=True)
                    excess -= size
            with reserved.open("wb") as stream:
                stream.truncate(num_bytes)  # a hole: its size counts, but it takes no space

    def _lock(self, name: str) -> AbstractContextManager[None]:
        return _locked(self._locks / self._key(name))

    def _key(self, name: str) -> str:
        return _hash(f"{self._below}/{name}" if self._below else name)


_claims: dict[Path, IO[bytes]] = {}


def open_store(data: Data) -> Store:
    """Return the store of a configuration's data. If it has a cache, register this process as a user until it ends.

    Raises ConfigError where the cache belongs to another remote, or a running job uses another limit.
    """
    if data.cache_dir is None:
        return LocalStore(data.path)
    store = CachedStore(data.path, cache_options(data))
    directory = store.options.directory.resolve()
    if earlier := _claims.pop(directory, None):
        earlier.close()
    _claims[directory] = _claim(store)
    return store


def cache_options(data: Data) -> CacheOptions:
    """Return the options of the cache `data.cache_dir`, which is set."""
    assert data.cache_dir is not None, "Config refuses an address without a cache"
    return CacheOptions(Path(data.cache_dir), data.cache_limit_gb, data.download_timeout_s, data.download_patience_s)


def _claim(store: CachedStore) -> IO[bytes]:
    """Register this process as a user of the cache, until the returned file is closed.

    A process that finds no other user deletes the files that killed jobs left half-written. Jobs with the same remote
    and limit share a cache.

    Raises:
        ConfigError: the directory belongs to another remote, or a running job uses another limit.
    """
    directory = store.options.directory
    stream = (directory / "in-use").open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(stream, fcntl.LOCK_SH)  # waits while another job is the only one, which is short
        alone = False
    else:
        alone = True
    wanted = {"remote": store.location, "limit_gb": store.options.limit_gb}
    recorded = _read_json(directory / "cache.json")
    if recorded is not None and recorded["remote"] != store.location:
        stream.close()
        raise ConfigError(
            f"data.cache_dir {directory} holds {recorded['remote']}, data.path is {store.location}: give each its own "
            "directory"
        )
    if not alone and recorded != wanted:
        stream.close()
        raise ConfigError(
            f"data.cache_dir {directory} is in use by a job with data.cache_limit_gb "
            f"{recorded and recorded['limit_gb']}, here it is {store.options.limit_gb}: give the same limit or "
            "another directory"
        )
    if alone:
        for leftover in (directory / "fetching").iterdir():
            leftover.unlink()
        shutil.rmtree(directory / WRITING, ignore_errors=True)
        write_text(directory / "cache.json", json.dumps(wanted))
        fcntl.flock(stream, fcntl.LOCK_SH)
    return stream


def _read_json(path: Path) -> dict[str, Any] | None:
    return read_object(path, "delete it, with no job in the cache", DataError) if path.is_file() else None


def _files(directory: Path, suffix: str) -> Iterator[tuple[float, int, Path]]:
    """Yield (last use, bytes, path) of every file below the directory; other processes may add and remove files."""
    for path in directory.rglob(f"*{suffix}"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        yield status.st_atime, status.st_size, path


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: {directory} cannot be made: {error.strerror}; give a local directory"
        ) from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _hash(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


# Share of the cache's limit that may be fetched before it is used: more would evict what is in use.
AHEAD_SHARE = 0.5


class Prefetcher:
    """A thread that fetches the shards that the training reads next, in the order of their first use.

    It ignores errors: the process that reads the shard gets the same error and reports it.
    """

    def __init__(self, store: CachedStore, share: float = AHEAD_SHARE) -> None:
        """Start it; it fetches at most this share of the cache's limit before it is used."""
        self._store, self._share = store, share
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, Shard]] = []
        self._position = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def follow(self, uses: Iterable[tuple[int, Shard]]) -> None:
        """Fetch the shards of `uses`, in this order, in place of all shards that are still to be fetched.

        Args:
            uses: pairs (position, shard), sorted by position: that of the shard's first sample among the samples that
                the training reads from now on. `advance` counts positions from here on.
        """
        with self._changed:
            self._waiting = list(uses)
            self._position = 0
            self._changed.notify()

    def advance(self, position: int) -> None:
        """Note that the training has reached the sample at `position`, counted from the last call of `follow`."""
        with self._changed:
            self._position = position
            self._changed.notify()

    def close(self) -> None:
        """End the thread, after the attempt to fetch a shard that it is making. Nobody may read from the store then."""
        self._store.fetcher.give_up = lambda: True
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (shard := self._next()) is not None:
            try:
                self._store.shard(shard)
            except (UserError, OSError):
                continue

    def _next(self) -> Shard | None:
        """Return the next shard to fetch, waiting until there is one; None once the prefetcher is closed."""
        limit = self._store.limit_bytes
        with self._changed:
            while not self._closed:
                # Shards that the training has passed were fetched by the process that read them.
                self._waiting = [use for use in self._waiting if use[0] >= self._position]
                ahead = 0
                for number, (_, shard) in enumerate(self._waiting):
                    ahead += shard.num_bytes
                    if limit is not None and ahead > self._share * limit:
                        break
                    if not self._store.holds(shard):
                        return self._waiting.pop(number)[1]
                self._changed.wait()
        return None
