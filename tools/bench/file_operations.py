"""The file operations of a process below one directory, counted as they happen, and a fault at one of them.

An audit hook sees what Python opens for writing, renames, removes and makes, before it happens; os.fsync, which has no
audit event, is replaced by a function that counts it. Files that C++ or Rust code opens by itself are not seen.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, NoReturn

KILL_ALL, KILL_RANK, FILL = "all ranks killed", "one rank killed", "disk full"
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit event -> (name of the operation, index of its path, index of the directory that the path is relative to).
_EVENTS = {
    "open": ("open", 0, None),
    "os.rename": ("rename", 1, 3),
    "os.remove": ("remove", 0, 1),
    "os.rmdir": ("rmdir", 0, 1),
    "os.mkdir": ("mkdir", 0, 2),
    "os.link": ("link", 1, 3),
    "os.symlink": ("symlink", 1, 2),
}


@dataclass(frozen=True)
class Operation:
    """A file operation of one rank."""

    rank: int
    number: int
    """1 for the rank's first operation."""
    name: str
    path: str
    """Path below the directory that is looked at."""


@dataclass(frozen=True)
class Strike:
    """A fault right before a rank's file operation."""

    action: str
    """KILL_ALL, KILL_RANK or FILL."""
    rank: int
    number: int


def look_at(folder: Path, rank: int, log: Path, strike: Strike | None) -> None:
    """Write every file operation of this process below `folder` to `log`, and strike at one of them.

    It lasts until the process ends. Processes that this one forks are not looked at.
    """
    _Hook(folder, rank, log, strike).install()


def read_operations(log: Path, rank: int) -> list[Operation]:
    """Return the operations that `look_at` wrote to `log`."""
    lines = log.read_text().splitlines() if log.is_file() else []
    return [Operation(rank, number, *line.split(" ", 1)) for number, line in enumerate(lines, 1)]


def path_of(event: str, arguments: tuple[Any, ...]) -> tuple[str, str] | None:
    """Return the operation and the absolute path of an audit event; None if it changes nothing on the disk."""
    if event not in _EVENTS:
        return None
    name, place, directory = _EVENTS[event]
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
        return None
    path = arguments[place]
    if isinstance(path, int):
        path = _of_descriptor(path)
    parent = None if directory is None or len(arguments) <= directory else arguments[directory]
    if isinstance(parent, int) and parent >= 0:
        path = os.path.join(_of_descriptor(parent), os.fsdecode(path))
    return name, os.path.abspath(os.fsdecode(path))


class _Hook:
    def __init__(self, folder: Path, rank: int, log: Path, strike: Strike | None) -> None:
        self._folder = str(folder.absolute()) + os.sep
        self._strike = strike if strike is not None and strike.rank == rank else None
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._process = os.getpid()
        self._number = 0
        self._lock = RLock()
        self._busy = False

    def install(self) -> None:
        fsync = os.fsync

        def counted(file: Any) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()
            self._count("fsync", _of_descriptor(descriptor))
            fsync(file)

        os.fsync = counted  # type: ignore[assignment]
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and not self._busy and os.getpid() == self._process:
            found = path_of(event, arguments)
            if found is not None:
                self._count(*found)

    def _count(self, name: str, path: str) -> None:
        if not path.startswith(self._folder) or os.getpid() != self._process:
            return
        with self._lock:
            self._number += 1
            os.write(self._log, f"{name} {path[len(self._folder) :]}\n".encode())
            if self._strike is not None and self._number == self._strike.number:
                self._busy = True
                _ACTIONS[self._strike.action](self._folder)
                self._busy = False


def _of_descriptor(descriptor: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{descriptor}")
    return ""


def _kill_all(folder: str) -> NoReturn:
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("it is killed")


def _kill_rank(folder: str) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it is killed")


def fill(folder: str) -> None:
    """Write a file `ballast` to `folder` until its disk is full."""
    with contextlib.suppress(OSError), open(os.path.join(folder, "ballast"), "wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))


_ACTIONS: dict[str, Callable[[str], None]] = {KILL_ALL: _kill_all, KILL_RANK: _kill_rank, FILL: fill}
