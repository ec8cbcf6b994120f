"""The texts of a suite's benchmarks, to keep them out of training data."""

from __future__ import annotations

from pathlib import Path

from ddk_ds.data.conversations import strings_in
from ddk_ds.errors import ConfigError
from ddk_ds.evaluation.suites import SUBJECT, SUITES, Chosen, check_files, choose_benchmarks, find_files, read_rows


def benchmark_texts(suite: str, data: Path | None) -> dict[str, list[str]]:
    """Return the texts of each benchmark of a suite: all strings in the columns of each row that is evaluated.

    Args:
        data: directory with the files of `ddk evaluate --data`.

    Raises:
        ConfigError: there is no such suite, or `data` is None.
        DataError: files are missing or have other columns; names them all.
    """
    if suite not in SUITES:
        raise ConfigError(f"decontaminate {suite!r}: the suites are {', '.join(SUITES)}")
    if data is None:
        raise ConfigError(f"decontaminate: {suite} needs benchmarks=DIR, the directory of ddk evaluate --data")
    wanted = [Chosen(chosen.benchmark, 0) for chosen in choose_benchmarks(suite, None)]
    subjects = {chosen.benchmark.name: _subjects(chosen) for chosen in wanted}
    check_files(data, wanted, subjects, option="benchmarks")
    return {chosen.benchmark.name: _texts(data, chosen, subjects[chosen.benchmark.name]) for chosen in wanted}


def _subjects(chosen: Chosen) -> list[str]:
    if SUBJECT not in chosen.benchmark.data.config:
        return [""]
    from ddk_ds.evaluation.harness import subjects_of  # importing it takes seconds

    return subjects_of(chosen.benchmark)


def _texts(data: Path, chosen: Chosen, subjects: list[str]) -> list[str]:
    texts = []
    for subject in subjects:
        files = find_files(data, chosen, subject)
        assert files is not None, "check_files has found them"
        rows = read_rows(files[chosen.benchmark.data.split])
        texts += [" ".join(strings_in([row[field] for field in chosen.benchmark.data.fields])) for row in rows]
    return texts
