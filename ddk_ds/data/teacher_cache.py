"""What a frozen teacher says of samples, on the disk: some tokens of its softmax at each of their positions.

    <path>/teacher.json            what all of it was computed with
    <path>/parts/<name>/           MDS shards of some samples, and samples.json: whose they are, and the teacher's loss
    <path>/perplexities/           the teacher's on held-out samples (train/validation.py)

A sample is known by its domain and its number in the domain, whatever order or run it was drawn in. A part appears
whole or not at all, and is never changed; any number of runs and ranks write parts of their own at the same time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from secrets import token_hex
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from ddk_ds.data.mds import Split, read_index
from ddk_ds.data.remote import Refused
from ddk_ds.data.store import AGAIN, Shard
from ddk_ds.data.teacher_place import PARTS, SAMPLES_FILE, Place
from ddk_ds.data.teacher_samples import NO_LABEL, Record, Said, coding_of
from ddk_ds.errors import CheckpointError, ConfigError, DataError, TemporaryError, UserError
from ddk_ds.files import own_hash, sealed, unsealed, write_text

FORMAT = 7
CONDITIONS_FILE, PERPLEXITIES = "teacher.json", "perplexities"
PART_BYTES = 64 << 20
_COLUMN = "said"
# Parts whose small files are read at the same time: there can be tens of thousands on a store.
_OPENED_AT_ONCE = 8
Numbers = npt.NDArray[np.int64]


class _Known(NamedTuple):
    """Samples of one domain that parts hold: numbers (n,) ascending, where each is, its loss and tokens."""

    numbers: Numbers
    parts: Numbers
    places: Numbers
    losses: npt.NDArray[np.float64]
    tokens: Numbers


class _Added(NamedTuple):
    """Bytes that are kept of a sample, the sum of the teacher's losses over its labels, and the number of these."""

    record: bytes
    loss: float
    tokens: int


class _Part(NamedTuple):
    """An opened part: its shards, and by domain the hash of data and teacher, and of its n samples (n,) each."""

    name: str
    split: Split
    shas: dict[str, str]
    teachers: dict[str, str]
    numbers: dict[str, Numbers]
    losses: dict[str, npt.NDArray[np.float64]]
    tokens: dict[str, Numbers]


class TeacherCache:
    """The samples of one teacher that are known, and those that this process adds."""

    def __init__(
        self,
        place: Place,
        conditions: Mapping[str, Any],
        shas: Mapping[str, str],
        vocab_size: int,
        teachers: Mapping[str, str] = {},
    ) -> None:
        """Open the cache at `place`, which need not exist.

        Args:
            conditions: what the samples' content depends on, as plain JSON; "keep" is among them.
            shas: hash of the samples of each domain, in the order of the run.
            teachers: fingerprint of the teacher of each domain; one that is not named may have any.

        Raises:
            ConfigError: the cache was computed with other conditions or by another teacher, or is of other data.
            DataError: a part is damaged.
        """
        self.place = place
        self.coding = coding_of(conditions, vocab_size)
        self._shas, self._teachers = dict(shas), dict(teachers)
        self._known: dict[str, _Known] = {}
        self._parts: list[_Part] = []
        self._added: dict[tuple[str, int], _Added] = {}
        self._added_bytes = 0
        self._failure: TemporaryError | None = None
        self._conditions = own_hash(conditions)
        _check_conditions(place, conditions)
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
        return sum(shard.num_bytes for part in self._parts for shard in part.split.shards)

    def mean_loss(self, domain: str) -> float:
        """Return the teacher's mean loss a token over the samples of `known`, in nats at temperature 1; nan: none."""
        known = self._known.get(domain)
        return (
            float("nan") if known is None or not known.tokens.any() else float(known.losses.sum() / known.tokens.sum())
        )

    def read(self, domain: str, number: int) -> Record | None:
        """Return what is known of a sample, for `coding`; None: nothing. Raises DataError if its part is damaged."""
        added = self._added.get((domain, number))
        if added is not None:
            return added.record
        found = self._find(domain, number)
        return None if found is None else self._read(*found, domain, number)

    def first_uses(self, samples: Iterable[tuple[str, Numbers, Numbers]]) -> list[tuple[int, Shard]]:
        """Return a pair (position, shard) for every shard that holds one of the samples, sorted by position.

        Samples are given as domains with their samples' positions (n,) and numbers (n,); a shard's position is that of
        the first one that lies in it.
        """
        first: dict[str, tuple[int, Shard]] = {}
        for domain, positions, numbers in samples:
            known = self._known.get(domain)
            if known is None:
                continue
            at = np.searchsorted(known.numbers, numbers).clip(max=len(known.numbers) - 1)
            there = known.numbers[at] == numbers
            at, positions = at[there], positions[there]
            for number in np.unique(known.parts[at]).tolist():
                inside = known.parts[at] == number
                for place, shard in self._parts[number].split.first_uses(known.places[at[inside]]):
                    position = int(positions[inside][place])
                    if shard.name not in first or position < first[shard.name][0]:
                        first[shard.name] = (position, shard)
        return sorted(first.values(), key=itemgetter(0))

    def _find(self, domain: str, number: int) -> tuple[int, int] | None:
        """Return a sample's part and its place there; None if no part holds it."""
        known = self._known.get(domain)
        if known is None:
            return None
        at = int(np.searchsorted(known.numbers, number))
        if at == len(known.numbers) or known.numbers[at] != number:
            return None
        return int(known.parts[at]), int(known.places[at])

    def add(self, domain: str, number: int, said: Said) -> Record:
        """Keep what the teacher says of a sample, and return it as `read` does.

        If there is enough for a part, it is written. Raises DataError if it is no distribution over the vocabulary.
        """
        try:
            record = self.coding.encoded(said)
        except ValueError as error:
            raise DataError(f"sample {number} of domain {domain!r}: {error}: is the teacher whole?") from None
        labels = said.label_log_probs[:-1]  # the last position has none
        labels = labels[labels < NO_LABEL]
        self._added[domain, number] = _Added(record, -float(labels.sum(dtype=np.float64)), len(labels))
        self._added_bytes += len(record)
        if self._added_bytes >= PART_BYTES and self._failure is None:
            self.offer()
        return record

    def offer(self) -> TemporaryError | None:
        """Write what was added as a part; if a store does not take it, for all its patience, keep it and return why.

        A rank can fail so in the middle of a step, where it must not leave the others: `check` raises it where all
        agree. Raises CheckpointError as `publish`.
        """
        try:
            self.publish()
            self._failure = None
        except TemporaryError as failure:
            self._failure = failure
        return self._failure

    def check(self) -> None:
        """Raise TemporaryError if a store has not taken what was offered last."""
        if self._failure is not None:
            raise self._failure

    def publish(self) -> None:
        """Write what was added as a part. Raises CheckpointError if it cannot be written, TemporaryError if not now."""
        if not self._added:
            return
        from streaming import MDSWriter

        name = token_hex(8)
        order = sorted(self._added)
        domains: dict[str, Any] = {}
        with self.place.new_part(name) as directory:
            with MDSWriter(
                out=str(directory), columns={_COLUMN: "bytes"}, hashes=["xxh64"], size_limit=PART_BYTES
            ) as writer:
                for domain, number in order:
                    record, loss, tokens = self._added[domain, number]
                    writer.write({_COLUMN: _hash(record, domain, number) + record})
                    about = {"sha": self._shas[domain], "teacher": self._teachers.get(domain, "")}
                    entry = domains.setdefault(domain, {**about, "numbers": [], "losses": [], "tokens": []})
                    entry["numbers"].append(number)
                    entry["losses"].append(loss)
                    entry["tokens"].append(tokens)
            index = xxhash.xxh64_hexdigest((directory / "index.json").read_bytes())
            samples = {"conditions": self._conditions, "index": index, "domains": domains}
            write_text(directory / SAMPLES_FILE, json.dumps(sealed(samples)))
        self._added.clear()
        self._added_bytes = 0
        self._take_up([name])

    def refresh(self) -> None:
        """Take up the parts that were written since the last time. Raises DataError if one is damaged."""
        opened = {part.name for part in self._parts}
        self._take_up([name for name in self.place.parts() if name not in opened])

    def _take_up(self, names: list[str]) -> None:
        with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
            parts = list(pool.map(self._open_part, names))
        found: dict[str, list[_Known]] = {}
        for part in parts:
            first, count = 0, len(self._parts)
            self._parts.append(part)
            for domain, numbers in part.numbers.items():
                places = np.arange(first, first + len(numbers))
                of_samples = part.losses[domain], part.tokens[domain]
                known = _Known(numbers, np.full(len(numbers), count), places, *of_samples)
                found.setdefault(domain, [self._known[domain]] if domain in self._known else []).append(known)
                first += len(numbers)
        for domain, of_domain in found.items():
            columns: list[Any] = [np.concatenate(column) for column in zip(*of_domain, strict=True)]
            _, first_of = np.unique(columns[0], return_index=True)
            self._known[domain] = _Known(*(column[first_of] for column in columns))

    def _open_part(self, name: str) -> _Part:
        directory, store = f"{PARTS}/{name}", self.place.store
        try:
            samples = unsealed(store.read(f"{directory}/{SAMPLES_FILE}"), SAMPLES_FILE)
            content = store.read(f"{directory}/index.json")
            digest = xxhash.xxh64_hexdigest(content)
            if digest != samples["index"]:
                raise ValueError(f"of its index.json the xxh64 is {digest}, {SAMPLES_FILE} says {samples['index']}")
            domains = samples["domains"]
            part = _Part(
                name,
                Split(store, self.place.reading(read_index(store, directory))),
                {domain: entry["sha"] for domain, entry in domains.items()},
                {domain: entry["teacher"] for domain, entry in domains.items()},
                {domain: np.array(entry["numbers"], np.int64) for domain, entry in domains.items()},
                {domain: np.array(entry["losses"], np.float64) for domain, entry in domains.items()},
                {domain: np.array(entry["tokens"], np.int64) for domain, entry in domains.items()},
            )
            of_samples = [(part.numbers[d], part.losses[d], part.tokens[d]) for d in domains]
            if any(len({values.shape for values in columns}) > 1 for columns in of_samples):
                raise ValueError(f"{SAMPLES_FILE} has not one loss for each sample")
            if sum(map(len, part.numbers.values())) != part.split.num_samples:
                raise ValueError(f"{SAMPLES_FILE} and index.json have different numbers of samples")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(name, error) from None
        if samples["conditions"] != self._conditions:
            raise ConfigError(
                f"teacher.cache.path {self.place.location}: its part {name} was computed with other conditions than "
                f"{CONDITIONS_FILE} says: another cache's parts were put here, move them away"
            )
        for domain, sha in part.shas.items():
            if self._shas.get(domain, sha) != sha:
                raise ConfigError(
                    f"teacher.cache.path {self.place.location}: its part {name} is of other samples of domain "
                    f"{domain!r} than data.path has now: give another directory for the cache, or the data that it "
                    "was computed of"
                )
            theirs, ours = part.teachers[domain], self._teachers.get(domain, part.teachers[domain])
            if theirs != ours:
                raise ConfigError(
                    f"teacher.cache.path {self.place.location}: in its part {name} the teacher of domain {domain!r} is "
                    f"{theirs}, the run's is {ours} (fingerprint and attention kernel): give another directory for the "
                    "cache, or in teacher.path or teacher.by_domain the teacher that it was computed by"
                )
        return part

    def _read(self, number_of_part: int, where: int, domain: str, number: int) -> Record:
        part = self._parts[number_of_part]
        try:
            columns, text = part.split.record(where)
            stored, record = columns[_COLUMN][:8], memoryview(columns[_COLUMN])[8:]
            if (found := _hash(record, domain, number)) != stored:
                raise ValueError(
                    f"{text}: the xxh64 is {found.hex()}, sample {number} of {domain} was written with {stored.hex()}"
                )
            return record
        except Exception as error:  # a byte that is another can make a reader raise anything
            raise self._damaged(part.name, error) from None

    def _damaged(self, name: str, error: Exception) -> UserError:
        """Return the error to raise for one that a part has caused."""
        if isinstance(error, UserError) and (not isinstance(error, DataError) or isinstance(error, Refused)):
            return error  # of the store, or of the configuration
        path = f"{self.place.location}/{PARTS}/{name}"
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            return DataError(f"teacher.cache.path: {path} cannot be read: {error.strerror or error}; mend that")
        return DataError(
            f"teacher.cache.path {self.place.location}: part {name} is damaged or incomplete "
            f"({str(error).removesuffix(f'; {AGAIN}')}); delete {path}: write_through computes its samples again"
        )


def _hash(record: Record, domain: str, number: int) -> bytes:
    """Return eight bytes that depend on a sample's content and on whose it is."""
    return xxhash.xxh64_digest(record, seed=xxhash.xxh64_intdigest(f"{domain} {number}"))


def make_cache(place: Place, conditions: Mapping[str, Any]) -> None:
    """Make a cache at a place, or check that it is one with these conditions, before anything is added.

    Raises ConfigError if it is another cache or something else, CheckpointError if it cannot be written.
    """
    if not _check_conditions(place, conditions):  # the first: a kill after it leaves a cache without parts
        place.write(CONDITIONS_FILE, json.dumps(sealed({"format": FORMAT, **conditions}), indent=1))
    place.begin()


def open_stored(place: Place, shas: Mapping[str, str] | None = None) -> TeacherCache:
    """Open the cache at `place` with the conditions that it was computed with, to look into it.

    Raises ConfigError if there is none or it is of other data than `shas` (those of TeacherCache; None: any), DataError
    if it is damaged.
    """
    stored = _stored_conditions(place)
    if stored is None:
        raise ConfigError(f"teacher.cache.path {place.location}: there is no cache")
    try:
        conditions = {key: stored[key] for key in stored if key != "format"}
        return TeacherCache(place, conditions, shas or {}, stored["vocab_size"])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"teacher.cache.path {place.location}: its {CONDITIONS_FILE} lacks a condition or is of another version "
            f"({error!r})"
        ) from None


def _check_conditions(place: Place, conditions: Mapping[str, Any]) -> bool:
    """Return True if there is a cache with these conditions, False if there is nothing."""
    wanted = {"format": FORMAT, **conditions}
    stored = _stored_conditions(place)
    if stored is None:
        if place.is_empty():
            return False
        stored = _stored_conditions(place)  # another process may have begun it in between
        if stored is None:
            raise ConfigError(
                f"teacher.cache.path {place.location}: it has no {CONDITIONS_FILE}, so it is no teacher's cache: give "
                "another directory, which need not exist"
            )
    changed = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
    if changed:
        shown = "; ".join(f"{key} {stored.get(key)!r}, the run has {wanted.get(key)!r}" for key in changed)
        raise ConfigError(
            f"teacher.cache.path {place.location}: it was computed with {shown}: give another directory, or the values "
            "that it was computed with"
        )
    return True


def _stored_conditions(place: Place) -> dict[str, Any] | None:
    """Return what CONDITIONS_FILE says; None if there is none. Raises CheckpointError if it is damaged."""
    content = place.read(CONDITIONS_FILE)
    if content is None:
        return None
    try:
        stored: dict[str, Any] = json.loads(content)
        return unsealed(content, CONDITIONS_FILE) if stored["format"] == FORMAT else stored
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"teacher.cache.path {place.location}: its {CONDITIONS_FILE} is damaged ({error}); put the file back, or "
            "delete the cache"
        ) from None
