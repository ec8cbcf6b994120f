"""Benchmarks' files are found by path, and one error names everything that is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from ddk_ds.errors import DataError
from ddk_ds.evaluation.suites import BENCHMARKS, Chosen, check_files, choose_benchmarks, find_files, read_rows

ARC = Chosen(BENCHMARKS["arc_easy"], 0)
ARC_FIVE = Chosen(BENCHMARKS["arc_easy"], 5)
MMLU = Chosen(BENCHMARKS["mmlu"], 0)
ROW = {"question": "Which?", "choices": {"text": ["this", "that"], "label": ["A", "B"]}, "answerKey": "B"}


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize(
    "name",
    [
        "arc_easy.jsonl",
        "arc_easy/test.jsonl",
        "arc_easy/test.parquet",
        "arc_easy/ARC-Easy/test-00000-of-00001.parquet",
        "ai2_arc/ARC-Easy/test-00000-of-00001.parquet",
    ],
)
def test_places_of_a_benchmark_without_examples(tmp_path: Path, name: str) -> None:
    path = touch(tmp_path / name)
    assert find_files(tmp_path, ARC) == {"test": [path]}
    assert find_files(tmp_path, ARC_FIVE) is None, "five-shot needs the examples' split too"
    assert find_files(tmp_path, Chosen(BENCHMARKS["arc_challenge"], 0)) is None


def test_parts_are_taken_in_order_and_examples_beside_them(tmp_path: Path) -> None:
    parts = [touch(tmp_path / "arc_easy" / f"test-0000{number}-of-00002.parquet") for number in (1, 0)]
    train = touch(tmp_path / "arc_easy" / "train.parquet")
    assert find_files(tmp_path, ARC_FIVE) == {"test": parts[::-1], "train": [train]}


def test_one_error_names_every_missing_data_set(tmp_path: Path) -> None:
    wanted = choose_benchmarks("paper", None)
    subjects = {chosen.benchmark.name: [""] for chosen in wanted} | {"mmlu": ["anatomy", "law"], "ceval": ["law"]}
    with pytest.raises(DataError) as raised:
        check_files(tmp_path, wanted, subjects)
    lines = str(raised.value).splitlines()
    assert len(lines) == 1 + len(BENCHMARKS)
    assert f"  arc_easy: {tmp_path}/arc_easy/test.jsonl" in lines[8]
    assert "columns question, choices, answerKey" in lines[8] and "allenai/ai2_arc" in lines[8]
    assert f"{tmp_path}/mmlu/anatomy/test.jsonl" in lines[2] and "1 more subjects" in lines[2]
    assert f"{tmp_path}/mbpp/test.jsonl, {tmp_path}/mbpp/prompt.jsonl" in lines[11], "3-shot: both splits"


def test_a_column_that_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "arc_easy.jsonl"
    path.write_text('{"question": "Which?", "choices": {}}\n')
    with pytest.raises(DataError, match=r"arc_easy.jsonl \(test\) lacks answerKey"):
        check_files(tmp_path, [ARC], {"arc_easy": [""]})
    path.write_text("{")
    with pytest.raises(DataError, match=f"{path} cannot be read"):
        check_files(tmp_path, [ARC], {"arc_easy": [""]})


def test_what_is_there_passes(benchmark_files: Path, tmp_path: Path) -> None:
    subjects = {"arc_easy": [""], "mmlu": ["anatomy", "virology"]}
    check_files(benchmark_files, [ARC, ARC_FIVE, MMLU], subjects)
    copy = tmp_path / "copy"
    shutil.copytree(benchmark_files / "mmlu", copy / "mmlu")
    (copy / "mmlu" / "virology" / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"mmlu/virology/test.jsonl"):
        check_files(copy, [MMLU], subjects)


def test_parquet_and_jsonl_give_the_same_rows(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([ROW, ROW]), tmp_path / "rows.parquet")
    assert list(read_rows([tmp_path / "rows.parquet"])) == [ROW, ROW]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"broken.parquet cannot be read"):
        list(read_rows([tmp_path / "broken.parquet"]))
