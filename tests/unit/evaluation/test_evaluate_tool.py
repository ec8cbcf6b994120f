"""tools/evaluate.py with a real model: tables, JSON, and errors that come before a model is loaded."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from ddk_ds.commands.evaluate_command import main
from ddk_ds.data.tokenizer import load_tokenizer
from ddk_ds.engine.generation import _encode
from ddk_ds.engine.whole_models import load_model
from ddk_ds.evaluation import benchmark_run as run
from ddk_ds.evaluation import sandbox
from ddk_ds.evaluation.cross_code import LANGUAGES
from tests.unit.evaluation.benchmarks import ROWS, write_rows


@pytest.fixture
def languages(tmp_path: Path) -> Path:
    root = tmp_path / "cross_code_eval"
    for language in LANGUAGES:
        row = {"prompt": "x = ", "groundtruth": "call()", "crossfile_context": {"text": "# other"}}
        write_rows(root / language / "line_completion.jsonl", [row, row])
    return root


@pytest.mark.long("every benchmark with a model, 37 s of CPU; each has tests of its own")
@pytest.mark.usefixtures("bwrap", "no_network")
def test_tables_and_json(
    tiny: Path, benchmark_files: Path, languages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "again").symlink_to(tiny / "model")
    models = [str(tiny / "model"), str(tmp_path / "again")]
    tasks = ["arc_easy", "gsm8k", "mbpp"]
    code = main(
        [
            *(*models, "--suite", "paper", "--tasks", ",".join(tasks), "--data", str(benchmark_files), "--limit", "2"),
            *("--shards", str(tiny / "shards"), "--cross-code-eval", str(languages), "--device", "cpu"),
            *("--batch-size", "4", "--allow-code-execution", "--out", str(tmp_path / "new" / "scores.json")),
        ]
    )
    output = capsys.readouterr()
    assert code == 0, output.err
    for title in ("ARC-E", "GSM8K", "MBPP", "average", "TypeScript", "C#", "bits per byte", "accents"):
        assert title in output.out, title
    assert "3-shot: MBPP" in output.out
    content = json.loads((tmp_path / "new" / "scores.json").read_text())
    first, second = content["models"]
    assert [first["model"], second["model"]] == models
    assert {**first, "model": ""} == {**second, "model": ""}, "one model twice has one result"
    assert [score["task"] for score in first["benchmarks"]] == ["gsm8k", "arc_easy", "mbpp"], "the paper's order"
    assert [score["shots"] for score in first["benchmarks"]] == [0, 0, 3]
    assert [score["metric"] for score in first["benchmarks"]] == [
        "exact_match,flexible-extract",
        "acc_norm,none",
        "pass@1",
    ]
    assert all(score["documents"] == 2 for score in first["benchmarks"])
    values = [score["value"] for score in first["benchmarks"]]
    assert values[0] == values[2] == 0.0, "a random model solves nothing"
    assert first["average"]["value"] == pytest.approx(sum(values) / 3)
    assert first["average"]["stderr"] == pytest.approx(math.hypot(*(s["stderr"] for s in first["benchmarks"])) / 3)
    assert [domain["domain"] for domain in first["domains"]] == ["plain", "accents"]
    assert len(first["cross_code_eval"]) == 8
    assert {"torch", "transformers", "lm_eval", "ddk_ds"} <= set(content["versions"])
    assert content["documents"] == "masked", "the shards have borders"
    assert content["commit"] and content["code_shut_in_by"].startswith("bubblewrap ") and content["limit"] == 2


def own_choice(model: Any, tokenizer: Any, document: dict[str, Any]) -> tuple[int, int]:
    """Compute the likeliest choice by sum and by bytes, with plain transformers."""
    before = f"Question: {document['question']}\nAnswer:"
    sums, sizes = [], []
    for choice in document["choices"]["text"]:
        start = len(tokenizer(before).input_ids)
        ids = torch.tensor([tokenizer(f"{before} {choice}").input_ids])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        sums.append(float(log_probs[range(ids.shape[1] - 1), ids[0, 1:]][start - 1 :].sum()))
        sizes.append(len(choice.encode()))
    by_bytes = [total / size for total, size in zip(sums, sizes, strict=True)]
    return sums.index(max(sums)), by_bytes.index(max(by_bytes))


def test_a_choice_is_that_of_plain_transformers(tiny: Path, tmp_path: Path) -> None:
    words = ("a long one of many words", "short", "of middling size", "two words")
    rows = []
    for number in range(12):
        choices = {"text": [words[(number + place) % 4] for place in range(4)], "label": list("ABCD")}
        rows.append({"question": f"Which of {number}?", "choices": choices, "answerKey": "ABCD"[number % 4]})
    write_rows(tmp_path / "arc_easy.jsonl", rows)
    out = tmp_path / "scores.json"
    options = ["--suite", "quick", "--tasks", "arc_easy", "--data", str(tmp_path), "--device", "cpu", "--out", str(out)]
    assert main([str(tiny / "model"), *options]) == 0
    (score,) = json.loads(out.read_text())["models"][0]["benchmarks"]
    model, tokenizer = load_model(tiny / "model"), AutoTokenizer.from_pretrained(tiny / "model")
    chosen = [own_choice(model, tokenizer, row) for row in rows]
    right = ["ABCD".index(row["answerKey"]) for row in rows]
    assert score["more"]["acc,none"] == pytest.approx(sum(a == r for (a, _), r in zip(chosen, right, strict=True)) / 12)
    assert score["value"] == pytest.approx(sum(b == r for (_, b), r in zip(chosen, right, strict=True)) / 12)
    assert 0 < score["value"] < 1, "a score that says something"


@pytest.mark.parametrize(("template", "begins"), [("$A", 0), ("B:0 $A", 1), ("B:0 $A E:0", 1), ("$A E:0", 0)])
def test_prompts_and_documents_begin_alike(tiny: Path, tmp_path: Path, template: str, begins: int) -> None:
    """A prompt has the BOS that transformers puts before a text, everywhere; what it puts after one ends no prompt."""
    from ddk_ds.evaluation.harness import load_lm

    shutil.copytree(tiny / "model", tmp_path, dirs_exist_ok=True)
    own = AutoTokenizer.from_pretrained(tmp_path)
    special = [("B", own.pad_token_id), ("E", own.eos_token_id)]
    own.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    own.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    plain = AutoTokenizer.from_pretrained(tmp_path)
    prompt = "one two"
    bare = plain(prompt, add_special_tokens=False).input_ids
    wanted = plain(prompt).input_ids[: begins + len(bare)]
    assert wanted == [own.pad_token_id] * begins + bare
    assert [*load_tokenizer(tmp_path).bos, *bare] == _encode(plain, prompt, chat=False) == wanted
    lm = load_lm(load_model(tiny / "model"), tmp_path, 1)
    assert lm.tok_encode(prompt)[: len(wanted)] == wanted
    assert lm.tok_encode(prompt) == wanted or template == "B:0 $A E:0"  # the harness adds both or none


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(run, "load_model", refuse)


@pytest.mark.usefixtures("no_model", "no_network")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to measure: give --suite"),
        (["--suite", "paper", "--tasks", "mbpp"], "mbpp would run code .* add --allow-code-execution"),
        (["--suite", "paper-5shot", "--tasks", "race"], "--tasks race: the suite paper-5shot has ceval"),
        (["--shards", "nowhere"], "data directory nowhere does not exist"),
        (["--cross-code-eval", "nowhere"], "nowhere/python/line_completion"),
        (["--suite", "quick", "--data", "nowhere"], "5 data sets are missing"),
        (["--suite", "quick", "--out", "pyproject.toml/scores.json"], "pyproject.toml is a file"),
        (["--suite", "quick", "--out", "docs"], "docs: is a directory"),
    ],
)
def test_refusals(tiny: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny / "model"), *options, "--device", "cpu"]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.usefixtures("no_model")
def test_models_that_are_not_there_and_packages_that_are_missing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = ["--shards", str(tiny / "shards"), "--device", "cpu"]
    (tmp_path / "empty").mkdir()
    assert main([str(tiny / "model"), str(tmp_path / "empty"), *shards]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    monkeypatch.setattr(run, "find_spec", lambda _name: None)
    assert main([str(tiny / "model"), "--suite", "quick", "--device", "cpu"]) == 2
    assert "pip install -c constraints.txt -e '.[eval]'" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([str(tiny / "model"), *shards[:2], "--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_a_suite_leaves_code_out_where_it_is_not_allowed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ddk_ds.evaluation import suites

    monkeypatch.setitem(suites.SUITES, "paper", {"arc_easy": 0, "humaneval": 0, "mbpp": 3})  # type: ignore[index]
    write_rows(tmp_path / "arc_easy.jsonl", [ROWS["arc_easy"](number) for number in range(2)])
    out = tmp_path / "scores.json"
    options = ["--suite", "paper", "--data", str(tmp_path), "--device", "cpu", "--out", str(out)]
    assert main([str(tiny / "model"), *options]) == 0
    assert "HumanEval, MBPP left out" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["left_out"] == ["humaneval", "mbpp"] and content["code_shut_in_by"] is None
    assert content["models"][0]["average"]["of"] == 1


MBPP = ["--suite", "paper", "--tasks", "mbpp", "--device", "cpu"]


@pytest.mark.usefixtures("no_model", "no_network")
def test_without_bubblewrap_code_is_refused_before_a_model_is_loaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([str(tiny / "model"), *MBPP, "--allow-code-execution"]) == 2
    error = capsys.readouterr().err
    assert "apt-get install bubblewrap, or dnf install bubblewrap" in error and "--unsafe-run-code" in error


def test_unsafe_code_runs_without_bubblewrap_and_is_warned_of(
    tiny: Path,
    benchmark_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda _name: None)
    out = tmp_path / "scores.json"
    options = ["--unsafe-run-code", "--data", str(benchmark_files), "--limit", "1", "--out", str(out)]
    assert main([str(tiny / "model"), *MBPP, *options]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert "--unsafe-run-code" in warning
    assert json.loads(out.read_text())["code_shut_in_by"] == "nothing"


@pytest.mark.usefixtures("bwrap")
def test_a_window_shorter_than_an_answer_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "humaneval.jsonl", [ROWS["humaneval"](1)])
    model = tmp_path / "short"
    model.mkdir()
    for path in (tiny / "model").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    options = ["--suite", "paper", "--tasks", "humaneval", "--data", str(tmp_path), "--device", "cpu"]
    assert main([str(model), *options, "--allow-code-execution"]) == 2
    assert "up to 1024 tokens, the model's window has 512" in capsys.readouterr().err
