"""A teacher's added tokens beyond the student's vocabulary are left out and named; any other difference is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ddk_ds.commands.distill_rank import main
from ddk_ds.commands.evaluate_command import main as evaluate
from ddk_ds.commands.preflight_command import main as preflight
from ddk_ds.commands.prepare_command import main as prepare
from tools.bench.small_run import write_config

THINK = ["<think>", "</think>"]
SIZE = 600


def with_tokens(model: Path, out: Path, tokens: Sequence[str], *, rows: bool = True, special: bool = False) -> Path:
    """Copy a model, and add tokens to its tokenizer as transformers does; with `rows` also to its matrices."""
    shutil.copytree(model, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.add_tokens(list(tokens), special_tokens=special) == len(tokens)
    tokenizer.save_pretrained(out)
    if rows:
        weights = load_file(out / "model.safetensors")
        for name in weights.keys() & {"lm_head.weight", "model.embed_tokens.weight"}:
            # Large rows: a softmax over them too would be seen.
            extra = torch.full((len(tokens), weights[name].shape[1]), 0.5)
            weights[name] = torch.cat((weights[name], extra))
        save_file(weights, out / "model.safetensors", {"format": "pt"})
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + len(tokens)}))
    return out


def error_of(config: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["--config", str(config), "--dry-run", *more]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


def test_a_teachers_added_tokens_are_named_and_left_out(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = with_tokens(workspace / "teacher", tmp_path / "teacher", THINK)
    config = write_config(workspace, tmp_path, teacher={"path": str(teacher)})
    assert main(["--config", str(config), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    said = "added tokens left out: 2 that not both models have, <think> (600), </think> (601); the data do not hold"
    assert printed.count(said) == 1 and "vocabulary 600;" in printed
    preflight(["--config", str(config), "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    rows = rows if isinstance(rows, list) else rows["rows"]
    row = next(row for row in rows if row["name"] == "tokenizers and data")
    assert row["status"] == "pass" and said in row["found"]
    # It can be measured on the run's data.
    assert evaluate([str(teacher), "--shards", str(workspace / "shards"), "--limit", "2"]) == 0


def test_other_differences_stay_refused(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = with_tokens(workspace / "student", tmp_path / "student", THINK)
    text = error_of(write_config(workspace, tmp_path, student={"path": str(student)}), capsys)
    assert "differ in 2 tokens, the first is '<think>' with id 600 in the student and None in the teacher" in text
    assert "only added tokens of the teacher after the student's last one can be left out" in text
    # A word of the model's own: an added token's text stays text without it, a piece's does not.
    teacher = with_tokens(workspace / "teacher", tmp_path / "teacher", [])
    content = json.loads((teacher / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["think"] = SIZE
    (teacher / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    text = error_of(write_config(workspace, tmp_path, teacher={"path": str(teacher)}), capsys)
    assert "differ in 1 tokens, the first is 'think' with id None in the student and 600 in the teacher" in text


def write_shards(tokenizer: Path, folder: Path, text: str) -> Path:
    """Prepare one domain, most of whose documents are plain, with a tokenizer."""
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"{text} {n} def f(x)"}) + "\n" for n in range(400)))
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"domains": {"chat": {"sources": [str(folder / "text.jsonl")]}}}))
    options = ["--sequence-length", "64", "--validation-samples", "12", "--workers", "1"]
    out = folder / f"shards-{len(list(folder.iterdir()))}"
    assert prepare(["--recipe", str(recipe), "--tokenizer", str(tokenizer), "--out", str(out), *options]) == 0
    return out


def test_data_of_the_teachers_tokenizer(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = with_tokens(workspace / "teacher", tmp_path / "teacher", THINK)
    plain = write_shards(teacher, tmp_path, "x = 1")
    config = write_config(workspace, tmp_path, teacher={"path": str(teacher)}, data={"path": str(plain)})
    assert main(["--config", str(config), "--dry-run"]) == 0
    used = write_shards(teacher, tmp_path, "<think> x = 1 </think>")
    text = error_of(config, capsys, f"data.path={used}")
    assert "domain 'chat'" in text and "holds the token '</think>' (id 601)" in text
    # Data of before say no largest id: their samples are refused when they are read.
    content = json.loads((used / "domains.json").read_text())
    for split in ("train", "validation"):
        assert content["domains"]["chat"][split].pop("largest_id") == 601
    (used / "domains.json").write_text(json.dumps(content))
    assert main(["--config", str(config), "--dry-run", f"data.path={used}"]) == 0


def test_a_token_without_a_row_in_both_models(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Gemma 3's tokenizer has a token for images, for which the text models have no row.
    models = {
        name: with_tokens(workspace / name, tmp_path / name, ["<image>"], rows=name == "teacher", special=True)
        for name in ("student", "teacher")
    }
    sections = {name: {"path": str(path)} for name, path in models.items()}
    config = write_config(workspace, tmp_path, **sections)
    assert main(["--config", str(config), "--dry-run"]) == 0
    assert "added tokens left out: 1 that not both models have, <image> (600);" in capsys.readouterr().out
