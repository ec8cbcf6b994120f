"""The directory of an unfinished preparation, which survives any kill: its finished parts and all digests.

A part is some documents of a domain. It is finished once the transaction that names it is committed to `state.sqlite`,
after its ids are on the disk. Everything else in the directory is cut back or written again.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ddk_ds.data.documents import Dropped, Position
from ddk_ds.data.recipe import Domain, SourceFile
from ddk_ds.errors import DISK_FULL, DataError
from ddk_ds.files import write_text

_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS domains (name TEXT PRIMARY KEY, number INT, limits TEXT, reading TEXT, result TEXT)
  WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (domain TEXT, number INT, name TEXT, identity TEXT, PRIMARY KEY (domain, number))
  WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS commits (address TEXT PRIMARY KEY, hash TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS near (key INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS digests (digest BLOB PRIMARY KEY) WITHOUT ROWID;
"""
_CACHE_KIB = 1 << 15


@dataclass
class Reading:
    """State of a domain's reading: `documents` and `tokens` are those in its spool; `done`: all is read.

    `control_tokens` are those that the text so far spells, `near_duplicates` and `contaminated` (by
    benchmark) the documents that are not in the spool. Conversations that were dropped as they were encoded are counted
    by the names of `Dropped`; `refusal` is what the template said of the first one that it refused.
    """

    position: Position = field(default_factory=Position)
    dropped: Dropped = field(default_factory=Dropped)
    documents: int = 0
    tokens: int = 0
    control_tokens: int = 0
    near_duplicates: int = 0
    contaminated: dict[str, int] = field(default_factory=dict)
    conversations: dict[str, int] = field(default_factory=dict)
    refusal: str = ""
    done: bool = False


class WorkDir:
    """An unfinished preparation, opened by `open_work` for one process at a time.

    Attributes:
        path: the directory.
        data: directory of the prepared data, which becomes the output.
        scratch: directory for downloads.
    """

    def __init__(self, path: Path, database: sqlite3.Connection) -> None:
        self.path = path
        self.data = path / "data"
        self.scratch = path / "download"
        self._database = database
        self._pending: set[bytes] = set()
        self.data.mkdir(exist_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def claim(self, settings: dict[str, Any]) -> None:
        """Store the settings of a new preparation; for an unfinished one check that it has the same settings.

        Raises:
            DataError: the directory holds parts of a preparation with other settings.
        """
        known = dict(self._database.execute("SELECT name, value FROM settings"))
        wanted = {name: json.dumps(value) for name, value in settings.items()}
        for name in wanted if known else ():
            if known.get(name) != wanted[name]:
                raise self._other(f"{name} was {known.get(name)}, now {wanted[name]}")
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", wanted.items())

    def commits(self) -> dict[str, str]:
        """Return the commits at which data sets of a hub are read, by their addresses."""
        return dict(self._database.execute("SELECT address, hash FROM commits"))

    def keep_commits(self, commits: Mapping[str, str]) -> None:
        """Store the commits, so that a continued preparation reads the same."""
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO commits VALUES (?, ?)", commits.items())

    def check_domains(self, domains: dict[str, Domain], files: dict[str, list[SourceFile]]) -> None:
        """Check that the finished parts were read from the domains, limits and files that are given now.

        Raises:
            DataError: one of them differs; the message names the first.
        """
        for name, number, limits in self._database.execute("SELECT name, number, limits FROM domains ORDER BY number"):
            if list(domains)[number : number + 1] != [name]:
                raise self._other(f"its domain number {number + 1} was {name!r}")
            if limits != _limits(domains[name]):
                raise self._other(f"domain {name!r} had {limits}, now {_limits(domains[name])}")
            self._check_files(name, domains[name], files[name])

    def claim_files(self, domains: dict[str, Domain], files: dict[str, list[SourceFile]]) -> None:
        """Store all that a new preparation reads at once; for an unfinished one check that it reads the same.

        Raises:
            DataError: a domain, its limits or a file differs; the message names the first.
        """
        path = self.path / "files.json"
        wanted = [[name, _limits(domain), list(map(_identity, files[name]))] for name, domain in domains.items()]
        if not path.exists():
            write_text(path, json.dumps(wanted))
        for known, now in zip_longest(json.loads(path.read_text(encoding="utf-8")), wanted, fillvalue=["", "", []]):
            if known[:2] != now[:2]:
                raise self._other(f"domain {known[0]!r} had {known[1]}, now {now[0]!r} has {now[1]}")
            for old, new in zip_longest(known[2], now[2]):
                if old != new:
                    raise self._other(f"domain {now[0]!r}, file {json.loads(old or new)[0]!r} is changed, gone or new")

    def _check_files(self, name: str, domain: Domain, files: Sequence[SourceFile]) -> None:
        query = "SELECT number, name, identity FROM files WHERE domain = ? ORDER BY number"
        count = 0
        for number, file_name, identity in self._database.execute(query, (name,)):
            count += 1
            if number >= len(files) or _identity(files[number]) != identity:
                raise self._other(f"domain {name!r}, file {file_name!r} was read and is changed, gone, or not in turn")
        reading = self.reading(name)
        if reading.done and not _capped(domain, reading) and count < len(files):
            raise self._other(f"domain {name!r} has a new file {files[count].name!r}")

    def _other(self, difference: str) -> DataError:
        return DataError(
            f"{self.path} holds an unfinished preparation that differs: {difference}; go on with the one that it "
            "holds, or give --start-anew to delete it"
        )

    def __contains__(self, digest: object) -> bool:
        return digest in self._pending or (
            self._database.execute("SELECT 1 FROM digests WHERE digest = ?", (digest,)).fetchone() is not None
        )

    def add(self, digest: bytes) -> None:
        """Remember a digest in memory; `keep` makes it permanent once its document is spooled."""
        self._pending.add(digest)

    def keep(self, digests: Sequence[bytes]) -> None:
        """Store the digests of spooled documents, which the next `commit` makes permanent."""
        self._database.executemany("INSERT INTO digests VALUES (?)", ((digest,) for digest in sorted(digests)))
        self._pending.difference_update(digests)

    def is_near(self, keys: Sequence[int]) -> bool:
        """Return True if a document that is kept has one of the keys; else store them, for the next `commit`."""
        places = ", ".join("?" * len(keys))
        found = self._database.execute(f"SELECT 1 FROM near WHERE key IN ({places}) LIMIT 1", keys).fetchone()
        if found is None:
            self._database.executemany("INSERT OR IGNORE INTO near VALUES (?)", ((key,) for key in keys))
        return found is not None

    def reading(self, name: str) -> Reading:
        """Return the state of a domain's reading at its last commit."""
        row = self._database.execute("SELECT reading FROM domains WHERE name = ?", (name,)).fetchone()
        if row is None:
            return Reading()
        saved = json.loads(row[0])
        return Reading(**{**saved, "position": Position(**saved["position"]), "dropped": Dropped(**saved["dropped"])})

    def commit(self, name: str, number: int, domain: Domain, files: Sequence[SourceFile], reading: Reading) -> None:
        """Record that a part is finished. The ids of `reading.documents` documents must already be on the disk."""
        begun = self._database.execute("SELECT COUNT(*) FROM files WHERE domain = ?", (name,)).fetchone()[0]
        end = len(files) if reading.done and not _capped(domain, reading) else reading.position.file + 1
        self._database.executemany(
            "INSERT INTO files VALUES (?, ?, ?, ?)",
            ((name, place, files[place].name, _identity(files[place])) for place in range(begun, end)),
        )
        self._database.execute(
            "INSERT OR REPLACE INTO domains VALUES (?, ?, ?, ?, NULL)",
            (name, number, _limits(domain), json.dumps(asdict(reading))),
        )
        self._database.commit()

    def result(self, name: str) -> dict[str, Any] | None:
        """Return the result that `finish` stored for a domain; None if the domain is not finished."""
        row = self._database.execute("SELECT result FROM domains WHERE name = ?", (name,)).fetchone()
        return None if row is None or row[0] is None else dict(json.loads(row[0]))

    def finish(self, name: str, result: dict[str, Any]) -> None:
        """Store the result of a domain whose shards are complete."""
        with self._database:
            self._database.execute("UPDATE domains SET result = ? WHERE name = ?", (json.dumps(result), name))


def _capped(domain: Domain, reading: Reading) -> bool:
    """Return True if max_bytes ended the reading, so that later files were not looked at."""
    return domain.max_bytes is not None and reading.position.num_bytes >= domain.max_bytes


def _limits(domain: Domain) -> str:
    return domain.model_dump_json(exclude={"sources": True, "chat": {"template"}})


def _identity(file: SourceFile) -> str:
    options = file.source.model_dump(exclude={"path", "exclude", "min_files"})
    return json.dumps([file.name, file.num_bytes, file.stamp, options])


@contextmanager
def open_work(path: Path, *, start_anew: bool = False) -> Iterator[WorkDir]:
    """Yield the work directory at `path`, created if missing; it is locked while the block runs, and not deleted.

    Raises:
        DataError: another process uses it, the disk is full, or its state is damaged.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{path} is in use: another preparation for the same directory runs") from None
        if start_anew:
            for entry in path.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != "lock":
                    entry.unlink()
        with _explained(path):
            database = sqlite3.connect(path / "state.sqlite")
            try:
                database.executescript(f"PRAGMA cache_size = -{_CACHE_KIB}; PRAGMA temp_store = MEMORY; {_SCHEMA}")
                yield WorkDir(path, database)
            finally:
                database.close()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn a full disk and a damaged state into a DataError that tells the user what to do."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        code = getattr(error, "sqlite_errorcode", None)
        if getattr(error, "errno", None) in DISK_FULL or code == sqlite3.SQLITE_FULL:
            raise DataError(
                f"the disk that holds {path} is full ({shutil.disk_usage(path).free:,} bytes are free): make room "
                "and give the same command again; finished parts are kept"
            ) from error
        if isinstance(error, sqlite3.Error):
            raise DataError(
                f"{path / 'state.sqlite'} cannot be used ({error}); give --start-anew to begin again"
            ) from error
        raise
