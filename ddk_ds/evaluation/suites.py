"""The benchmarks, the suites of them, and the files that hold their documents on machines without a hub.

The choice of benchmarks and the numbers of examples are the paper's (arXiv 2407.16154, Tables 1 to 8). Prompts and
answer extraction are those of lm-evaluation-harness, since the paper does not fix them (docs/evaluation.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from ddk_ds.errors import ConfigError, DataError


@dataclass(frozen=True)
class DataSet:
    """The source of a benchmark's documents."""

    hub: str
    """Name on the Hugging Face hub."""
    config: str
    """Configuration on the hub; empty if there is only one, `SUBJECT` if each subject is a configuration."""
    split: str
    """Name of the split that is evaluated."""
    examples: str
    """Name of the split that holds the examples before the question."""
    fields: tuple[str, ...]
    """The columns that the task reads."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, which is one column of the table of results."""

    name: str
    """Name in --tasks, and of the benchmark's directory below --data."""
    title: str
    folder: str
    """Directory of the harness' task files, below its own `tasks`; empty if this package has the task file."""
    task: str
    """The harness' task; for a benchmark with subjects, the common beginning of its tasks' names."""
    metric: str
    """The harness' metric and filter, or `pass@1`, which this package measures."""
    data: DataSet

    @property
    def runs_code(self) -> bool:
        """Return True if the benchmark is measured by running generated programs."""
        return self.metric == PASS_AT_1


SUBJECT = "{subject}"
PASS_AT_1 = "pass@1"
_ARC_FIELDS = ("question", "choices", "answerKey")
_LETTERS = ("question", "A", "B", "C", "D", "answer")
_EXTRACTED = "exact_match,flexible-extract"

BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            *("ceval", "C-Eval", "ceval", "ceval-valid_", "acc,none"),
            DataSet("ceval/ceval-exam", SUBJECT, "val", "dev", _LETTERS),
        ),
        Benchmark(
            *("mmlu", "MMLU", "mmlu/default", "mmlu_", "acc,none"),
            DataSet("cais/mmlu", SUBJECT, "test", "dev", ("question", "choices", "answer")),
        ),
        Benchmark(
            *("race", "RACE", "race", "race", "acc,none"),
            DataSet("EleutherAI/race", "high", "test", "", ("article", "problems")),
        ),
        Benchmark(
            *("c3", "C3", "", "c3", "acc_norm,none"),
            DataSet("clue/clue", "c3", "validation", "train", ("context", "question", "choice", "answer")),
        ),
        Benchmark(
            *("winogrande", "WinoGrande", "winogrande", "winogrande", "acc,none"),
            DataSet(
                *("allenai/winogrande", "winogrande_xl", "validation", "train"),
                ("sentence", "option1", "option2", "answer"),
            ),
        ),
        Benchmark(
            *("gsm8k", "GSM8K", "gsm8k", "gsm8k", _EXTRACTED),
            DataSet("openai/gsm8k", "main", "test", "train", ("question", "answer")),
        ),
        Benchmark(
            *("commonsense_qa", "CommonsenseQA", "commonsense_qa", "commonsense_qa", "acc,none"),
            DataSet("tau/commonsense_qa", "", "validation", "train", _ARC_FIELDS),
        ),
        Benchmark(
            *("arc_easy", "ARC-E", "arc", "arc_easy", "acc_norm,none"),
            DataSet("allenai/ai2_arc", "ARC-Easy", "test", "train", _ARC_FIELDS),
        ),
        Benchmark(
            *("arc_challenge", "ARC-C", "arc", "arc_challenge", "acc_norm,none"),
            DataSet("allenai/ai2_arc", "ARC-Challenge", "test", "train", _ARC_FIELDS),
        ),
        Benchmark(
            *("humaneval", "HumanEval", "humaneval", "humaneval", PASS_AT_1),
            DataSet("openai/openai_humaneval", "", "test", "", ("prompt", "test", "entry_point")),
        ),
        Benchmark(
            *("mbpp", "MBPP", "mbpp", "mbpp", PASS_AT_1),
            DataSet(
                *("google-research-datasets/mbpp", "full", "test", "prompt"),
                ("task_id", "text", "code", "test_list", "test_setup_code"),
            ),
        ),
    )
}

SUITES: Mapping[str, Mapping[str, int]] = {
    "paper": {name: 3 if name == "mbpp" else 0 for name in BENCHMARKS},
    "paper-5shot": dict.fromkeys(("ceval", "mmlu", "gsm8k", "arc_easy", "arc_challenge"), 5),
    "quick": dict.fromkeys(("c3", "winogrande", "commonsense_qa", "arc_easy", "arc_challenge"), 0),
}
"""For each suite, the number of examples before the question by benchmark, in the order of the paper's columns."""
QUICK_LIMIT = 200
"""Number of documents of each benchmark that the suite `quick` takes without --limit."""


@dataclass(frozen=True)
class Chosen:
    """A benchmark that a suite asks for."""

    benchmark: Benchmark
    shots: int
    """Number of examples before the question."""


def choose_benchmarks(suite: str, tasks: Sequence[str] | None) -> list[Chosen]:
    """Return the suite's benchmarks with their numbers of examples, or only those that `tasks` names, in its order.

    Raises ConfigError that names a task which the suite lacks.
    """
    shots = SUITES[suite]
    for name in tasks or ():
        if name not in shots:
            raise ConfigError(f"--tasks {name}: the suite {suite} has {', '.join(shots)}")
    return [Chosen(BENCHMARKS[name], shots[name]) for name in shots if tasks is None or name in tasks]


SUFFIXES = ("jsonl", "parquet")
SplitFiles = dict[str, list[Path]]


def split_directories(root: Path, benchmark: Benchmark, subject: str = "") -> list[Path]:
    """Return the directories below `root` that can hold a benchmark's splits; they need not exist.

    The directory has the benchmark's name or its hub repository's last name; the splits lie in it, or in a directory of
    the data set's configuration, which can depend on `subject`.
    """
    data = benchmark.data
    config = data.config.replace(SUBJECT, subject)
    inner = [config] if SUBJECT in data.config else ["", config, "data"]
    names = dict.fromkeys((benchmark.name, data.hub.rpartition("/")[2]))
    return list(dict.fromkeys(root / name / part if part else root / name for name in names for part in inner))


def find_files(root: Path, chosen: Chosen, subject: str = "") -> SplitFiles | None:
    """Return the files of each split that a benchmark needs, or None if a split has no file."""
    benchmark, data = chosen.benchmark, chosen.benchmark.data
    for directory in split_directories(root, benchmark, subject):
        files = {split: _split_files(directory, split) for split in _splits(chosen)}
        if all(files.values()):
            return files
    if SUBJECT not in data.config and not chosen.shots:
        for path in (root / f"{benchmark.name}.{suffix}" for suffix in SUFFIXES):
            if path.is_file():
                return {data.split: [path]}
    return None


def _splits(chosen: Chosen) -> list[str]:
    data = chosen.benchmark.data
    return [data.split, data.examples] if chosen.shots else [data.split]


def _split_files(directory: Path, split: str) -> list[Path]:
    for suffix in SUFFIXES:
        files = [*directory.glob(f"{split}.{suffix}"), *directory.glob(f"{split}-*.{suffix}")]
        if files:
            return sorted(files)
    return []


def check_files(
    root: Path, wanted: Sequence[Chosen], subjects: Mapping[str, Sequence[str]], option: str = "--data"
) -> None:
    """Raise one DataError that lists every data set that is missing below `root` or lacks a column.

    `subjects` holds the list of subjects by benchmark name; a benchmark without subjects has the list [""].
    `option` is the one that gave `root`.
    """
    faults = [fault for chosen in wanted for fault in _faults(root, chosen, subjects[chosen.benchmark.name])]
    if faults:
        head = f"{option} {root}: {len(faults)} data sets are missing or have other columns:"
        raise DataError("\n".join((head, *(f"  {fault}" for fault in faults))))


def _faults(root: Path, chosen: Chosen, subjects: Sequence[str]) -> Iterator[str]:
    benchmark, data = chosen.benchmark, chosen.benchmark.data
    missing = []
    for subject in subjects:
        split_files = find_files(root, chosen, subject)
        if split_files is None:
            missing.append(subject)
            continue
        for split, files in split_files.items():
            lacking = [field for field in data.fields if field not in next(read_rows(files), {})]
            if lacking:
                yield f"{benchmark.name}: {files[0]} ({split}) lacks {', '.join(lacking)}"
    if missing:
        directory = split_directories(root, benchmark, missing[0])[0]
        expected = ", ".join(f"{directory}/{split}.jsonl" for split in _splits(chosen))
        more = f" and of {len(missing) - 1} more subjects" if len(missing) > 1 else ""
        columns = ", ".join(data.fields)
        yield f"{benchmark.name}: {expected} (or .parquet){more}; columns {columns}; on the hub {data.hub}"


def read_rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of .jsonl and .parquet files. Raises DataError that names a file which cannot be read."""
    for path in files:
        try:
            if path.suffix == ".parquet":
                with parquet.ParquetFile(path) as stored:
                    for batch in stored.iter_batches():
                        yield from batch.to_pylist()
            else:
                with path.open(encoding="utf-8") as lines:
                    yield from (json.loads(line) for line in lines if line.strip())
        except (OSError, ValueError, RecursionError, pyarrow.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
