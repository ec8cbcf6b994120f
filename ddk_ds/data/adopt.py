"""Token shards that exist become data of a run: they are checked, hashed and described, and stay where they are.

The new directory holds domains.json and an index.json for each split, whose entries name the shards' files
(adopted_shards.py). With `copy` it holds shards of this project instead. The shards themselves are only read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import tee
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ddk_ds.data.adopted_shards import BIN, Side, border_lengths
from ddk_ds.data.manifest import SPLITS, DomainInfo, Manifest, SplitInfo, load_manifest, write_manifest
from ddk_ds.data.mds import BORDERS_ENCODING, Lengths, content_hash, token_dtype, write_split
from ddk_ds.data.prepare import SHARD_BYTES, refuse_existing
from ddk_ds.data.same_cuts import probe_hash
from ddk_ds.data.shard_plan import shards_of
from ddk_ds.data.token_sources import (
    Entry,
    TwoParts,
    bin_entries,
    bin_pairs,
    cut_samples,
    ids_dtype,
    index_of,
    is_compressed,
    mds_entries,
    read_rows,
)
from ddk_ds.data.tokenizer import TokenizerInfo
from ddk_ds.errors import DataError
from ddk_ds.files import new_directory, size_and_xxh64

_HELD_OUT_NAMES = ("validation", "val")
_HASH_SEED = 20241203
_HASHED_IDS = 1 << 20
IdRow = npt.NDArray[np.integer[Any]]
Told = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Source:
    """A domain's shards: a directory of MDS shards, or .bin and .idx; `validation` are held-out ones, None: cut off."""

    name: str
    place: Path
    validation: Path | None = None


@dataclass(frozen=True)
class Rules:
    """The options of an adoption.

    `sequence_length` is that of samples cut from .bin files; MDS samples must have it where it is given.
    `held_out` is the number of samples cut off at the end, of domains without a `validation`. `ids` is the dtype in a
    column of bytes, None: found. `borders` says on which side of an EOS ("after") or BOS ("before") a document ends.
    """

    sequence_length: int | None
    held_out: int
    ids: str | None = None
    borders: Side | None = None
    copy: bool = False
    workers: int = 1


@dataclass(frozen=True)
class Opened:
    """A domain that can be adopted, as far as its indexes say; entries have absolute paths.

    `places` are where its shards were found, and its held-out ones; None: they are cut off.
    """

    source: Source
    places: tuple[Path, Path | None]
    parts: TwoParts
    sequence_length: int
    is_bin: bool

    def samples(self, held_out: bool) -> int:
        """Return the number of samples of a split."""
        return sum(entry["samples"] for entry in self.parts[held_out])


class Facts(NamedTuple):
    """The findings in an entry's ids: `loose` are ends without a beginning behind them, or beginnings without an end.

    `hashes` (n,) are those of the samples, and `documents` (n,) their numbers of documents; None if not known.
    """

    digest: str
    largest: int
    eos: int
    bos: int
    loose: int
    hashes: npt.NDArray[np.uint64]
    documents: npt.NDArray[np.int64] | None


def open_source(source: Source, rules: Rules) -> Opened:
    """Read a domain's indexes and the ids of its first shard. Raises DataError where they cannot be adopted."""
    place, validation = _two_places(source)
    pairs = bin_pairs(place)
    held_out = 0 if validation else rules.held_out
    if pairs:
        if rules.sequence_length is None:
            raise DataError(f"{place}: documents in .bin are cut into samples: give --sequence-length")
        length = rules.sequence_length
        parts = bin_entries(pairs, length, held_out)
        if validation:
            if not (others := bin_pairs(validation)):
                raise DataError(f"{validation}: no .idx, as {place} has it")
            parts = TwoParts(parts.train, bin_entries(others, length, 0).train)
    else:
        parts = cut_samples(mds_entries(place), held_out)
        if validation:
            parts = TwoParts(parts.train, mds_entries(validation))
        length = _open_mds(parts, rules)
    opened = Opened(source, (place, validation), parts, length, bool(pairs))
    _check_samples(opened, rules)
    return opened


def _two_places(source: Source) -> tuple[Path, Path | None]:
    """Return where a domain's shards are, and its held-out ones: those that are named, or train/ and val/ in it."""
    place, inside = source.place, source.place / "train"
    if not (place / "index.json").is_file() and (inside / "index.json").is_file():
        others = [place / name for name in _HELD_OUT_NAMES if (place / name / "index.json").is_file()]
        return inside, source.validation or (others[0] if others else None)
    if not (place / "index.json").is_file() and not bin_pairs(place):
        raise DataError(
            f"{place}: neither index.json (MDS shards) nor .idx (Megatron-LM) is there; give their directory"
        )
    return place, source.validation


def _open_mds(parts: TwoParts, rules: Rules) -> int:
    """Note in the entries of MDS shards how their ids are read, and return the length of their samples."""
    entries = [*parts.train, *parts.held_out]
    if not entries:
        raise DataError("the index names no sample; give shards that hold some")
    if not rules.copy and (packed := next((entry for entry in entries if is_compressed(entry)), None)):
        raise DataError(
            f"shard {packed['path']} is compressed ({packed['compression']}), so no sample can be read from it: give "
            "--copy, which writes the ids to new shards, or decompress the shards beside their index"
        )
    first = entries[0]
    if first["column_encodings"][first["column_names"].index("tokens")] == "bytes":
        dtype = rules.ids or ids_dtype(first)
        for entry in entries:
            entry["ids"] = dtype
    length = int(read_rows(first, None)[0].shape[1])
    if rules.sequence_length not in (None, length):
        raise DataError(
            f"--sequence-length is {rules.sequence_length}, the samples of {first['path']} have {length} ids: leave it "
            "out"
        )
    return length


def _check_samples(opened: Opened, rules: Rules) -> None:
    train, held_out = opened.samples(False), opened.samples(True)
    if train < 1 or held_out < 1:
        raise DataError(
            f"{opened.source.place} gives {train:,} samples of {opened.sequence_length:,} ids to train on and "
            f"{held_out:,} held-out ones; give more shards, fewer --validation-samples than {rules.held_out:,}, or "
            "--validation"
        )


def copied_bytes(opened: Sequence[Opened], info: TokenizerInfo) -> int:
    """Return the number of bytes of ids that `copy` writes."""
    size = np.dtype(token_dtype(info.vocab_size)).itemsize
    return sum((one.samples(False) + one.samples(True)) * one.sequence_length * size for one in opened)


def adopt(
    opened: Sequence[Opened],
    info: TokenizerInfo,
    out: Path,
    rules: Rules,
    told: Told = lambda _name, _done, _total: None,
) -> tuple[Manifest, dict[str, int]]:
    """Check all ids and write the new directory `out`.

    Returns the manifest, and for each domain how many of its held-out samples are also trained on. `told` gets the
    name of a domain, and how many of its shards are checked.

    Raises DataError: shards are damaged, hold ids outside of the vocabulary, or samples of several lengths; borders
    asked for are not exact; or `out` exists.
    """
    if info.eos_token_id is None:
        raise DataError(f"{info.path.parent} names no EOS token; set it in tokenizer_config.json")
    lengths = {one.source.name: one.sequence_length for one in opened}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the domains' samples have several lengths, {lengths}: adopt those of one length together")
    refuse_existing(out)
    domains, bos, shared = {}, True, {}
    with new_directory(out) as root:
        writer = _Writer(info, rules, root, out.resolve(), all(one.is_bin or rules.borders for one in opened))
        for one in opened:
            facts = _check(one, info, rules, told)
            name = one.source.name
            shared[name] = int(np.isin(_hashes(facts.held_out), _hashes(facts.train)).sum())
            bos = bos and any(found.bos for part in facts for found in part)
            domains[name] = writer.domain(one, facts)
        manifest = Manifest(
            root=root,
            sequence_length=opened[0].sequence_length,
            dtype=token_dtype(info.vocab_size),
            tokenizer_fingerprint=info.fingerprint,
            vocab_size=info.vocab_size,
            eos_token_id=info.eos_token_id,
            bos=info.bos if bos else (),
            probe_hash=probe_hash(info),
            borders=writer.borders,
            tokenizer_path=str(info.path.parent.absolute()),
            domains=domains,
        )
        write_manifest(manifest)
    return load_manifest(out), shared


class _AllFacts(NamedTuple):
    train: list[Facts]
    held_out: list[Facts]


def _check(one: Opened, info: TokenizerInfo, rules: Rules, told: Told) -> _AllFacts:
    entries = [*one.parts.train, *one.parts.held_out]
    found = []
    with ThreadPoolExecutor(rules.workers) as pool:
        try:
            for facts in pool.map(lambda entry: _facts(entry, one.sequence_length, info, rules), entries):
                found.append(facts)
                told(one.source.name, len(found), len(entries))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if rules.borders is not None and not one.is_bin:
        _check_borders(one, found, info, rules.borders)
    return _AllFacts(found[: len(one.parts.train)], found[len(one.parts.train) :])


def _facts(entry: Entry, length: int, info: TokenizerInfo, rules: Rules) -> Facts:
    """Read an entry's ids. Raises DataError where one is outside of the vocabulary, or the shard is damaged."""
    ids, digest = read_rows(entry, length)
    if ids.min() < 0 or ids.max() >= info.vocab_size:
        sample, place = np.argwhere((ids < 0) | (ids >= info.vocab_size))[0].tolist()
        raise DataError(
            f"shard {entry['path']}: sample {sample + entry.get('first', 0)} has the id {ids[sample, place]} at "
            f"{place}, the vocabulary of {info.path.parent} has {info.vocab_size:,}; give the tokenizer that made "
            "the shards"
        )
    bos = -1 if info.bos_token is None else info.vocab[info.bos_token]
    ends, begins = ids == info.eos_token_id, ids == bos
    loose = 0 if bos == info.eos_token_id else int((ends[:, :-1] != begins[:, 1:]).sum())
    documents = None
    if entry["format"] == BIN:
        index, begin = index_of(entry)
        documents = index.counts(begin, len(ids), length)
    elif rules.borders is not None:
        documents = 1 + (ends[:, :-1] if rules.borders == "after" else begins[:, 1:]).sum(1)
    counts = int(ends.sum()), int(begins.sum()), loose
    return Facts(digest, int(ids.max()), *counts, sample_hashes(ids), documents)


def _check_borders(one: Opened, found: Sequence[Facts], info: TokenizerInfo, side: Side) -> None:
    """Raise DataError if documents cannot be told apart by their EOS or BOS."""
    token, count = ("EOS", "eos") if side == "after" else ("BOS", "bos")
    if side == "before" and info.bos_token is None:
        raise DataError(f"--borders bos: {info.path.parent} names no BOS token; give eos, or leave it out")
    if not sum(getattr(facts, count) for facts in found):
        raise DataError(f"--borders: no sample of {one.source.place} holds the {token}; leave --borders out")
    both = sum(facts.eos for facts in found) and sum(facts.bos for facts in found)
    if both and (loose := sum(facts.loose for facts in found)):
        raise DataError(
            f"--borders: in {one.source.place} {loose:,} EOS are not followed by a BOS, or BOS not preceded by an EOS, "
            "so that borders are not exact; leave --borders out: the documents of a sample are then joined"
        )


def sample_hashes(ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint64]:
    """Return a hash (n,) of each of the samples (n, L): equal samples have equal ones, others by chance of 2^-63."""
    weights = np.random.default_rng(_HASH_SEED).integers(0, 1 << 64, ids.shape[1], np.uint64)
    step = max(1, _HASHED_IDS // ids.shape[1])
    parts = [ids[first : first + step].astype(np.uint64) @ weights for first in range(0, len(ids), step)]
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def _hashes(found: Sequence[Facts]) -> npt.NDArray[np.uint64]:
    return np.concatenate([facts.hashes for facts in found])


@dataclass(frozen=True)
class _Writer:
    """The writer of a new directory, which is `root` until it is whole and `out` then; `borders`: samples have them."""

    info: TokenizerInfo
    rules: Rules
    root: Path
    out: Path
    borders: bool

    def domain(self, one: Opened, facts: _AllFacts) -> DomainInfo:
        """Write a domain's two splits, and return what domains.json says of it."""
        splits = []
        for number, split in enumerate(SPLITS):
            directory, entries, found = self.root / one.source.name / split, one.parts[number], facts[number]
            if self.rules.copy:
                sha = self._copy(directory, one, entries)
            else:
                sha = self._index(directory, one, entries, found)
            samples, largest = one.samples(bool(number)), max(part.largest for part in found)
            counts = _joined([part.documents for part in found])
            documents = -1 if counts is None else int(counts.sum())
            splits.append(SplitInfo(documents, samples * one.sequence_length, samples, -1, sha, largest))
        place, validation = one.places
        adopted: dict[str, Any] = {"format": BIN if one.is_bin else "mds", "train": self._from_root(place.resolve())}
        adopted |= {"held_out": self._from_root(validation.resolve()) if validation else self.rules.held_out}
        return DomainInfo(splits[0], splits[1], adopted={**adopted, "copied": self.rules.copy})

    def _border(self) -> tuple[Side, int]:
        """Return the side and the id that the borders of MDS samples go by."""
        side = self.rules.borders or "after"
        token = self.info.eos_token_id if side == "after" else self.info.vocab[str(self.info.bos_token)]
        return side, int(token or 0)

    def _index(self, directory: Path, one: Opened, entries: Sequence[Entry], found: Sequence[Facts]) -> str:
        """Write a split's index.json, whose entries name the shards where they are, and return its hash."""
        read_as = [f"ndarray:{token_dtype(self.info.vocab_size)}:{one.sequence_length}"]
        read_as += [BORDERS_ENCODING] if self.borders else []
        written = []
        for entry, facts in zip(entries, found, strict=True):
            more: Entry = {"path": self._from_root(Path(entry["path"])), "read_as": read_as}
            more["raw_data"] = {**entry["raw_data"], "hashes": {"xxh64": facts.digest}}
            if one.is_bin:
                num_bytes, digest = _hash_of_idx(Path(entry["path"]).with_suffix(".idx"))
                more["documents"] = {"bytes": num_bytes, "xxh64": digest}
            elif self.borders:
                more["borders"] = self._border()
            written.append({**{key: value for key, value in entry.items() if key != "in_file"}, **more})
        directory.mkdir(parents=True)
        documents = _joined([part.documents for part in found]) if self.borders else None
        dtype, samples = token_dtype(self.info.vocab_size), sum(entry["samples"] for entry in entries)
        counts = np.zeros(samples, np.int64) if documents is None else documents
        shape: dict[str, Any] = {"sequence_length": one.sequence_length, "dtype": dtype, "shard_bytes": SHARD_BYTES}
        order = list(shards_of([counts], **shape, borders=documents is not None))
        content = {"version": 2, "shards": written, "order": order}
        text = json.dumps(content, indent=1)
        (directory / "index.json").write_text(text, encoding="utf-8")
        return content_hash(json.loads(text))

    def _copy(self, directory: Path, one: Opened, entries: Sequence[Entry]) -> str:
        """Write the ids to new shards, and return the hash of their index."""
        dtype = token_dtype(self.info.vocab_size)
        first, second = tee(self._samples(one, entries))
        written = write_split(
            directory,
            (ids.astype(dtype) for ids, _ in first),
            sequence_length=one.sequence_length,
            dtype=dtype,
            shard_bytes=SHARD_BYTES,
            lengths=(lengths for _, lengths in second) if self.borders else None,
        )
        return str(written["sha"])

    def _samples(self, one: Opened, entries: Sequence[Entry]) -> Iterator[tuple[IdRow, Lengths]]:
        """Yield the ids (L,) of each sample, and its documents' lengths as far as they are known."""
        for entry in entries:
            for number, ids in enumerate(read_rows(entry, one.sequence_length)[0]):
                begin = number * len(ids)
                if one.is_bin:
                    yield ids, _lengths(entry, begin, begin + len(ids))
                else:
                    yield ids, border_lengths(ids, *self._border())

    def _from_root(self, path: Path) -> str:
        """Return a path from the data's root, or the absolute one where they have no directory in common."""
        return os.path.relpath(path, self.out) if path.parts[:2] == self.out.parts[:2] else str(path)


def _lengths(entry: Entry, first: int, last: int) -> Lengths:
    """Return the lengths of the documents in the ids of a part of a .bin, from number `first` to `last`."""
    index, begin = index_of(entry)
    return index.lengths(begin + first, begin + last)


def _joined(documents: Sequence[npt.NDArray[np.int64] | None]) -> npt.NDArray[np.int64] | None:
    known = [counts for counts in documents if counts is not None]
    return np.concatenate(known) if len(known) == len(documents) else None


@cache
def _hash_of_idx(path: Path) -> tuple[int, str]:
    return size_and_xxh64(path)
