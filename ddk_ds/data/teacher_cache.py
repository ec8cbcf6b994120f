"""What a frozen teacher says of samples, on the disk: tokens drawn from its softmax at each of their positions.

    <path>/teacher.json            what all of it was computed with
    <path>/parts/<name>/           MDS shards of some samples, and samples.json, which says whose they are
    <path>/perplexities/           the teacher's on held-out samples (train/validation.py)

A sample is known by its domain and its number in the domain, whatever order or run it was drawn in. A part appears
whole or not at all, and is never changed; any number of runs and ranks write parts of their own at the same time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ddk_ds.data.mds import Split, read_index
from ddk_ds.data.store import LocalStore
from ddk_ds.data.teacher_samples import DrawnTokens, Said
from ddk_ds.errors import ConfigError, DataError
from ddk_ds.files import PARTIAL, is_leftover, new_directory, read_object, write_text, written

FORMAT = 1
CONDITIONS_FILE, PARTS, PERPLEXITIES = "teacher.json", "parts", "perplexities"
_SAMPLES = "samples.json"
PART_BYTES = 64 << 20
_DEAD_AFTER_S = 3600.0
Numbers = npt.NDArray[np.int64]


class _Known(NamedTuple):
    """Samples of one domain that parts hold: numbers (n,) ascending, and where each is."""

    numbers: Numbers
    parts: Numbers
    places: Numbers


class TeacherCache:
    """The samples of one teacher that are known, and those that this process adds."""

    def __init__(self, path: Path, conditions: Mapping[str, Any], shas: Mapping[str, str], vocab_size: int) -> None:
        """Open the cache at `path`, which need not exist.

        Args:
            conditions: what the samples' content depends on, as plain JSON; "draws" is among them.
            shas: hash of the samples of each domain, in the order of the run.

        Raises:
            ConfigError: the cache was computed with other conditions, or is of other data.
            DataError: a part is damaged.
        """
        self.path = path
        self._coding = DrawnTokens(int(conditions["draws"]), vocab_size)
        self._shas = dict(shas)
        self._known: dict[str, _Known] = {}
        self._parts: list[tuple[str, Split]] = []
        self._added: dict[tuple[str, int], dict[str, Any]] = {}
        self._added_bytes = 0
        _check_conditions(path, conditions)
        self.refresh()

    def known(self, domain: str) -> Numbers:
        """Return the numbers (n,), ascending, of the domain's samples that parts hold."""
        return self._known[domain].numbers if domain in self._known else np.zeros(0, np.int64)

    @property
    def domains(self) -> list[str]:
        """Return the domains of which parts hold samples."""
        return list(self._known)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the shards of all parts."""
        return sum(shard.num_bytes for _, split in self._parts for shard in split.shards)

    def read(self, domain: str, number: int) -> Said | None:
        """Return what is known of a sample; None if nothing is. Raises DataError if its part is damaged."""
        added = self._added.get((domain, number))
        if added is not None:
            return self._coding.decoded(added)
        known = self._known.get(domain)
        if known is None:
            return None
        at = int(np.searchsorted(known.numbers, number))
        if at == len(known.numbers) or known.numbers[at] != number:
            return None
        return self._read(int(known.parts[at]), int(known.places[at]), domain, number)

    def add(self, domain: str, number: int, said: Said) -> None:
        """Keep what the teacher says of a sample, and write a part when there is enough for one."""
        record = self._added[domain, number] = self._coding.encoded(said)
        self._added_bytes += sum(memoryview(value).nbytes for value in record.values())
        if self._added_bytes >= PART_BYTES:
            self.publish()

    def publish(self) -> None:
        """Write what was added as a part. Raises CheckpointError if it cannot be written."""
        if not self._added:
            return
        from streaming import MDSWriter

        name = token_hex(8)
        columns = {"domain": "str", "number": "int", **self._coding.columns}
        order = sorted(self._added)
        numbers: dict[str, list[int]] = {}
        with written(self.path), new_directory(self.path / PARTS / name) as directory:
            with MDSWriter(out=str(directory), columns=columns, hashes=["xxh64"], size_limit=PART_BYTES) as writer:
                for domain, number in order:
                    writer.write({"domain": domain, "number": number, **self._added[domain, number]})
                    numbers.setdefault(domain, []).append(number)
            samples = {domain: {"sha": self._shas[domain], "numbers": numbers[domain]} for domain in numbers}
            write_text(directory / _SAMPLES, json.dumps(samples))
        self._added.clear()
        self._added_bytes = 0
        self.refresh()

    def refresh(self) -> None:
        """Take up the parts that were written since the last time. Raises DataError if one is damaged."""
        folder = self.path / PARTS
        names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        opened = {name for name, _ in self._parts}
        found: dict[str, list[_Known]] = {}
        for name in names:
            if name in opened or name.startswith("."):
                continue
            for domain, known in self._open_part(name).items():
                found.setdefault(domain, [self._known[domain]] if domain in self._known else []).append(known)
        for domain, parts in found.items():
            joined = _Known(*(np.concatenate(column) for column in zip(*parts, strict=True)))
            _, first = np.unique(joined.numbers, return_index=True)
            self._known[domain] = _Known(*(column[first] for column in joined))

    def _open_part(self, name: str) -> dict[str, _Known]:
        directory = f"{PARTS}/{name}"
        store = LocalStore(self.path)
        try:
            index = read_index(store, directory)
            samples = json.loads(store.read(f"{directory}/{_SAMPLES}"))
            numbers = {domain: np.array(entry["numbers"], np.int64) for domain, entry in samples.items()}
            shas = {domain: str(entry["sha"]) for domain, entry in samples.items()}
            if sum(map(len, numbers.values())) != index.num_samples:
                raise ValueError(f"{_SAMPLES} and index.json have different numbers of samples")
            split = Split(store, index)
        except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(name, error) from None
        for domain, sha in shas.items():
            if self._shas.get(domain, sha) != sha:
                raise ConfigError(
                    f"teacher.cache.path {self.path}: its part {name} is of other samples of domain {domain!r} than "
                    "data.path has now: give another directory for the cache, or the data that it was computed of"
                )
        known, first, part = {}, 0, len(self._parts)
        self._parts.append((name, split))
        for domain, of_domain in numbers.items():
            places = np.arange(first, first + len(of_domain))
            known[domain] = _Known(of_domain, np.full(len(of_domain), part), places)
            first += len(of_domain)
        return known

    def _read(self, part: int, place: int, domain: str, number: int) -> Said:
        name, split = self._parts[part]
        try:
            record, where = split.record(place)
            if (record["domain"], record["number"]) != (domain, number):
                raise DataError(f"{where} is {record['domain']} {record['number']}, not {domain} {number}")
            return self._coding.decoded(record)
        except (DataError, OSError, ValueError, KeyError) as error:
            raise self._damaged(name, error) from None

    def _damaged(self, name: str, error: Exception) -> DataError:
        return DataError(
            f"teacher.cache.path {self.path}: part {name} is damaged or incomplete ({error}); delete {PARTS}/{name}: "
            "write_through computes its samples again"
        )


def make_cache(path: Path, conditions: Mapping[str, Any]) -> None:
    """Make the directory of a cache, or check that it is one with these conditions, before anything is added.

    Raises ConfigError if it is another cache or something else, CheckpointError if it cannot be written.
    """
    _check_conditions(path, conditions)
    with written(path):
        path.mkdir(parents=True, exist_ok=True)
        if not (path / CONDITIONS_FILE).is_file():  # the first: a kill after it leaves a cache without parts
            write_text(path / CONDITIONS_FILE, json.dumps({"format": FORMAT, **conditions}, indent=1))
        (path / PARTS).mkdir(exist_ok=True)
        _remove_dead(path / PARTS)


def open_stored(path: Path, shas: Mapping[str, str] | None = None) -> TeacherCache:
    """Open the cache at `path` with the conditions that it was computed with, to look into it.

    Raises ConfigError if there is none or it is of other data than `shas` (those of TeacherCache; None: any), DataError
    if it is damaged.
    """
    file = path / CONDITIONS_FILE
    if not file.is_file():
        raise ConfigError(f"teacher.cache.path {path}: there is no cache")
    stored = read_object(file, "delete the cache, or copy it again whole")
    try:
        return TeacherCache(
            path, {key: stored[key] for key in stored if key != "format"}, shas or {}, stored["vocab_size"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: it lacks a condition or is of another version ({error!r})") from None


def _check_conditions(path: Path, conditions: Mapping[str, Any]) -> None:
    file, wanted = path / CONDITIONS_FILE, {"format": FORMAT, **conditions}
    if not file.is_file():
        if path.is_dir() and not all(is_leftover(other) for other in path.iterdir()):
            raise ConfigError(
                f"teacher.cache.path {path}: it has no {CONDITIONS_FILE}, so it is no teacher's cache: give another "
                "directory, which need not exist"
            )
        return
    stored = read_object(file, "delete the cache, or copy it again whole")
    changed = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
    if changed:
        shown = "; ".join(f"{key} {stored.get(key)!r}, the run has {wanted.get(key)!r}" for key in changed)
        raise ConfigError(
            f"teacher.cache.path {path}: it was computed with {shown}: give another directory, or the values that it "
            "was computed with"
        )


def _remove_dead(folder: Path) -> None:
    """Delete parts that killed processes have begun."""
    for path in folder.glob(f"{PARTIAL}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _DEAD_AFTER_S:
                rmtree(path, ignore_errors=True)
