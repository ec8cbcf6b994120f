"""A preparation in parts: what all of its tasks know, and how the work is dealt to them.

The files of a recipe are cut into blocks, runs of files of one domain: a function of the recipe and its files alone. A
stage is work on units (blocks, or shards), each of which gives a file of its own in the directory of the unfinished
preparation. So the number of parts, and which task does a unit on which machine, and how often, changes no byte.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from typing import Protocol

from ddk_ds.data.recipe import Recipe, SourceFile
from ddk_ds.files import sync

BLOCK_BYTES = 1 << 26
_BLOCK_FILES = 1 << 12


@dataclass(frozen=True)
class Block:
    """The files of a domain from number `first` up to `end`, and their stored bytes; `number` counts all blocks."""

    number: int
    domain: str
    first: int
    end: int
    num_bytes: int


@dataclass(frozen=True)
class PartsJob:
    """The job that all tasks of a preparation in parts know; its paths are absolute, on a disk that all machines share.

    `root` is the directory of the unfinished preparation, `shards` that of the prepared data in it. A document begins
    with the ids `bos`.
    """

    root: Path
    recipe: Recipe
    files: Mapping[str, Sequence[SourceFile]]
    tokenizer: Path
    bos: tuple[int, ...]
    dtype: str
    sequence_length: int
    seed: int

    @property
    def shards(self) -> Path:
        """Return the directory of the prepared data."""
        return self.root / "data"

    def files_of(self, block: Block) -> Sequence[SourceFile]:
        """Return the files of a block."""
        return self.files[block.domain][block.first : block.end]

    def path(self, stage: str, name: str) -> Path:
        """Return the path of a unit's result, in a directory of its own for each stage."""
        return self.root / stage / name


class Stage(Protocol):
    """Work on units, each of which is complete when its result is there, and does not depend on the others."""

    @property
    def name(self) -> str:
        """Return the name of the stage, and of the directory of its logs and marks."""

    @property
    def weights(self) -> Sequence[int]:
        """Return how much work each unit is, in bytes."""

    def result(self, unit: int) -> Path:
        """Return the path of a unit's result, which appears complete or not at all."""

    def run(self, units: Iterable[int]) -> None:
        """Make the results of units. Raises UserError, or OSError of a disk."""


def plan_blocks(files: Mapping[str, Sequence[SourceFile]], block_bytes: int) -> list[Block]:
    """Return the blocks of all domains, in order. A block ends with the file that fills it; files are not cut.

    A remote file of unknown size is a block.
    """
    blocks: list[Block] = []
    for domain, of_domain in files.items():
        first, num_bytes = 0, 0
        for number, file in enumerate(of_domain, 1):
            unknown = file.remote is not None and not file.num_bytes
            num_bytes += block_bytes if unknown else file.num_bytes
            if num_bytes >= block_bytes or number == len(of_domain) or number - first == _BLOCK_FILES:
                blocks.append(Block(len(blocks), domain, first, number, num_bytes))
                first, num_bytes = number, 0
    return blocks


def deal(weights: Sequence[int], parts: int) -> list[list[int]]:
    """Return the units of each part, in order: the heaviest unit first, each to the part that has least."""
    units: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]
    for unit in sorted(range(len(weights)), key=lambda unit: (-weights[unit], unit)):
        load, part = heapq.heappop(loads)
        units[part].append(unit)
        heapq.heappush(loads, (load + max(weights[unit], 1), part))
    return [sorted(of_part) for of_part in units]


def missing(stage: Stage, units: Iterable[int]) -> list[int]:
    """Return the units without a result.

    Directories are listed: of single files a network's file system may answer for a minute what it knew before.
    """
    names: dict[Path, set[str]] = {}
    left = []
    for unit in units:
        path = stage.result(unit)
        if path.parent not in names:
            names[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        if path.name not in names[path.parent]:
            left.append(unit)
    return left


@contextmanager
def unit_directory(path: Path) -> Iterator[Path]:
    """Yield a new directory next to a unit's result `path`; it is removed when the block ends.

    What killed tasks left of the same unit is removed, also under the hands of a task that does it at the same time:
    one of the two ends the unit.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):
        rmtree(left, ignore_errors=True)
    directory = path.with_name(f".{path.name}.{token_hex(4)}")
    directory.mkdir()
    try:
        yield directory
    finally:
        rmtree(directory, ignore_errors=True)


def put(file: Path, path: Path) -> None:
    """Rename a complete file to `path`, after its content is on the disk."""
    sync(file)
    file.replace(path)
