"""The pass of shards: each is written from the tokens of its samples, wherever its documents lie."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddk_ds.data.blocks import PartsJob, put, unit_directory
from ddk_ds.data.held_out import HeldOut
from ddk_ds.data.mds import pack, pack_lengths, read_index, write_split
from ddk_ds.data.shard_plan import shard_samples
from ddk_ds.data.spooled import Spooled, Stretch
from ddk_ds.data.store import LocalStore
from ddk_ds.files import write_text

_GROUP_SHARDS = 8


@dataclass(frozen=True)
class SplitText:
    """One split of a domain's documents, for `directory` below that of the data; `starts` as in spooled.py."""

    directory: str
    spooled: Spooled
    held_out: HeldOut
    validation: bool
    starts: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class ShardGroup:
    """Consecutive shards of a split: the number of the first one, its first sample, and the samples of each."""

    split: SplitText
    first_shard: int
    first_sample: int
    samples: tuple[int, ...]


def group_shards(split: SplitText, sequence_length: int, shard_bytes: int) -> list[ShardGroup]:
    """Return all shards of a split, in groups that are written in one go."""
    lengths = split.spooled.lengths(split.held_out, validation=split.validation)
    options = {"sequence_length": sequence_length, "shard_bytes": shard_bytes}
    samples = list(shard_samples(lengths, dtype=split.spooled.dtype, **options))
    groups, first_sample = [], 0
    for first in range(0, len(samples), _GROUP_SHARDS):
        of_group = tuple(samples[first : first + _GROUP_SHARDS])
        groups.append(ShardGroup(split, first, first_sample, of_group))
        first_sample += sum(of_group)
    return groups


@dataclass(frozen=True)
class ShardsStage:
    """Writes groups of shards; a result has their entries of the index, and the largest id."""

    job: PartsJob
    groups: Sequence[ShardGroup]
    shard_bytes: int
    name: str = "shards"

    @property
    def weights(self) -> Sequence[int]:
        """Return the tokens' bytes of the groups."""
        return [
            sum(group.samples) * self.job.sequence_length * np.dtype(self.job.dtype).itemsize for group in self.groups
        ]

    def result(self, unit: int) -> Path:
        """Return the path of a group's entries, which are written after its shards."""
        group = self.groups[unit]
        return self.job.path("shards", f"{group.split.directory.replace('/', '.')}.{group.first_shard}.json")

    def run(self, units: Iterable[int]) -> None:
        """Write groups of shards. Raises OSError if the disk is full."""
        for unit in units:
            self._write(self.groups[unit], self.result(unit))

    def _write(self, group: ShardGroup, result: Path) -> None:
        length, split = self.job.sequence_length, group.split
        begin = group.first_sample * length
        stretch = Stretch(begin, begin + sum(group.samples) * length, split.starts)
        options: dict[str, Any] = {"validation": split.validation, "stretch": stretch}
        with unit_directory(result) as directory:
            written = write_split(
                directory / "split",
                pack(split.spooled.ids(split.held_out, **options), length),
                sequence_length=length,
                dtype=self.job.dtype,
                shard_bytes=self.shard_bytes,
                lengths=pack_lengths(split.spooled.lengths(split.held_out, **options), length),
            )
            entries = json.loads((directory / "split/index.json").read_text(encoding="utf-8"))["shards"]
            assert [entry["samples"] for entry in entries] == list(group.samples), "shard_plan.py counts as MDSWriter"
            to = self.job.shards / split.directory
            to.mkdir(parents=True, exist_ok=True)
            for number, entry in enumerate(entries):
                name, raw = entry["raw_data"]["basename"], entry["raw_data"]
                raw["basename"] = name.replace(f"{number:05}", f"{group.first_shard + number:05}")
                put(directory / "split" / name, to / raw["basename"])
        write_text(result, json.dumps({"largest_id": written["largest_id"], "entries": entries}))


def join_groups(job: PartsJob, groups: Sequence[ShardGroup]) -> dict[str, Any]:
    """Write the index of a split whose groups of shards are all there; return what `write_split` returns."""
    results = [ShardsStage(job, [group], 0).result(0).read_text(encoding="utf-8") for group in groups]
    written = list(map(json.loads, results))
    directory = groups[0].split.directory
    # As MDSWriter writes it.
    content = {"version": 2, "shards": [entry for of_group in written for entry in of_group["entries"]]}
    write_text(job.shards / directory / "index.json", json.dumps(content, sort_keys=True))
    index = read_index(LocalStore(job.shards), directory)
    largest_id = max(of_group["largest_id"] for of_group in written)
    return {"samples": index.num_samples, "sha": index.sha, "largest_id": largest_id}
