"""A benchmark's documents as files below one directory, for machines without a hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from ddk_ds.errors import DataError
from ddk_ds.evaluation.suites import SUBJECT, Benchmark, Chosen

ENDINGS = ("jsonl", "parquet")
SplitFiles = dict[str, list[Path]]


def places(root: Path, benchmark: Benchmark, subject: str = "") -> list[Path]:
    """Directories that may hold a benchmark's splits: of its own name, or a copy of the hub's repository."""
    data = benchmark.data
    config = data.config.replace(SUBJECT, subject)
    inner = [config] if SUBJECT in data.config else ["", config, "data"]
    names = dict.fromkeys((benchmark.name, data.hub.rpartition("/")[2]))
    return list(dict.fromkeys(root / name / part if part else root / name for name in names for part in inner))


def find_files(root: Path, chosen: Chosen, subject: str = "") -> SplitFiles | None:
    """Files of the splits that a benchmark needs; None where one is missing."""
    benchmark, data = chosen.benchmark, chosen.benchmark.data
    for place in places(root, benchmark, subject):
        found = {split: _split_files(place, split) for split in _splits(chosen)}
        if all(found.values()):
            return found
    if SUBJECT not in data.config and not chosen.shots:
        for path in (root / f"{benchmark.name}.{ending}" for ending in ENDINGS):
            if path.is_file():
                return {data.split: [path]}
    return None


def _splits(chosen: Chosen) -> list[str]:
    data = chosen.benchmark.data
    return [data.split, data.examples] if chosen.shots else [data.split]


def _split_files(place: Path, split: str) -> list[Path]:
    for ending in ENDINGS:
        files = [*place.glob(f"{split}.{ending}"), *place.glob(f"{split}-*.{ending}")]
        if files:
            return sorted(files)
    return []


def check_files(root: Path, wanted: Sequence[Chosen], subjects: Mapping[str, Sequence[str]]) -> None:
    """One DataError that lists every data set that is missing below `root` or lacks a column.

    `subjects`: those of each benchmark by its name; one empty subject where it has none.
    """
    faults = [fault for chosen in wanted for fault in _faults(root, chosen, subjects[chosen.benchmark.name])]
    if faults:
        head = f"--data {root}: {len(faults)} data sets are missing or have other columns:"
        raise DataError("\n".join((head, *(f"  {fault}" for fault in faults))))


def _faults(root: Path, chosen: Chosen, subjects: Sequence[str]) -> Iterator[str]:
    benchmark, data = chosen.benchmark, chosen.benchmark.data
    missing = []
    for subject in subjects:
        found = find_files(root, chosen, subject)
        if found is None:
            missing.append(subject)
            continue
        for split, files in found.items():
            lacking = [field for field in data.fields if field not in next(read_rows(files), {})]
            if lacking:
                yield f"{benchmark.name}: {files[0]} ({split}) lacks {', '.join(lacking)}"
    if missing:
        place = places(root, benchmark, missing[0])[0]
        expected = ", ".join(f"{place}/{split}.jsonl" for split in _splits(chosen))
        more = f" and of {len(missing) - 1} more subjects" if len(missing) > 1 else ""
        columns = ", ".join(data.fields)
        yield f"{benchmark.name}: {expected} (or .parquet){more}; columns {columns}; on the hub {data.hub}"


def read_rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The rows of some .jsonl or .parquet files. Raises DataError naming the file that cannot be read."""
    for path in files:
        try:
            if path.suffix == ".parquet":
                with parquet.ParquetFile(path) as stored:
                    for batch in stored.iter_batches():
                        yield from batch.to_pylist()
            else:
                with path.open(encoding="utf-8") as lines:
                    yield from (json.loads(line) for line in lines if line.strip())
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
