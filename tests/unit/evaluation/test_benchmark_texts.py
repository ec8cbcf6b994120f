"""The texts of a suite's benchmarks, of files that the fixture writes in the form of `ddk evaluate --data`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ddk_ds.commands.prepare_command import main
from ddk_ds.errors import ConfigError, DataError
from ddk_ds.evaluation.benchmark_texts import benchmark_texts
from ddk_ds.evaluation.suites import BENCHMARKS
from tests.unit.data.corpus import make_texts, write_recipe


def test_each_row_that_is_evaluated_gives_one_text_of_all_its_strings(benchmark_files: Path) -> None:
    texts = benchmark_texts("paper", benchmark_files)
    assert list(texts) == list(BENCHMARKS) and all(texts.values())
    rows = [json.loads(line) for line in (benchmark_files / "mmlu/virology/test.jsonl").read_text().splitlines()]
    expected = [" ".join([row["question"], *row["choices"]]) for row in rows]
    assert len(expected) > 0 and set(expected) <= set(texts["mmlu"])


def test_what_is_missing_is_an_error_before_any_work(
    benchmark_files: Path, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="decontaminate 'papers': the suites are paper, "):
        benchmark_texts("papers", benchmark_files)
    with pytest.raises(ConfigError, match="decontaminate: paper needs benchmarks=DIR"):
        benchmark_texts("paper", None)
    copy = tmp_path / "copy"
    shutil.copytree(benchmark_files, copy)
    shutil.rmtree(copy / "mmlu/virology")
    with pytest.raises(DataError, match=r"benchmarks .*copy: 1 data sets are missing(.|\n)*mmlu/virology/test.jsonl"):
        benchmark_texts("paper", copy)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(1, 40)))
    recipe = write_recipe(tmp_path / "r.yaml", {"a": {"sources": ["a.jsonl"]}})
    command = ["--recipe", str(recipe), "--tokenizer", str(tiny / "model"), "--out", str(tmp_path / "out")]
    command += ["--sequence-length", "32", "--validation-samples", "5", "--workers", "1", "decontaminate=quick"]
    assert main([*command, f"benchmarks={tmp_path / 'none'}"]) == 2
    assert "allenai/winogrande" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "copy", "r.yaml"]
    assert main([*command, f"benchmarks={benchmark_files}"]) == 0
    assert "kept out, by n-grams of so many words: c3 " in capsys.readouterr().out
