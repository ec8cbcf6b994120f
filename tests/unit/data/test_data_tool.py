"""tools/prepare_data.py: the report, overrides, progress without a terminal, exit codes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from ddk_ds.commands import prepare_command as prepare_data
from ddk_ds.data.manifest import load_manifest
from tests.unit.data.corpus import make_texts, write_recipe
from tests.unit.data.test_data_prepare import write_lines


def arguments(recipe: Path, tokenizer_dir: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--recipe", str(recipe), "--tokenizer", str(tokenizer_dir), "--out", str(out), "--workers", "1"),
        *("--sequence-length", "32", "--validation-samples", "5", *more),
    ]


def test_the_report_says_what_was_dropped_and_why(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = make_texts(5, 80)
    (tmp_path / "text").mkdir()
    write_lines(tmp_path / "text/a.jsonl", texts + texts[:7] + ["x", "y", "z" * 900])
    with (tmp_path / "text/a.jsonl").open("ab") as stream:
        stream.write(b'{"text": "\xff"}\n' + b'{"text": null}\n' * 4)
    recipe = write_recipe(tmp_path / "r.yaml", {"a": {"sources": ["a.jsonl"], "min_chars": 9}})
    more = (f"root={tmp_path / 'text'}", "domains.a.max_chars=800")
    assert prepare_data.main(arguments(recipe, tokenizer_dir, tmp_path / "out", *more)) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.split()[:1] == ["a"]]
    assert rows[0][1] == "81"
    assert rows[1][1:6] == ["7", "2", "1", "4", "1"]
    assert all(len(line.rstrip()) <= 80 for line in printed.splitlines() if "out" not in line)


def test_a_domain_with_more_held_out_than_left_is_named(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    for seed, (name, count) in enumerate({"small": 12, "large": 200}.items()):
        write_lines(tmp_path / f"text/{name}.jsonl", make_texts(seed, count, 80))
    recipe = write_recipe(tmp_path / "r.yaml", {name: {"sources": [f"{name}.jsonl"]} for name in ("small", "large")})
    more = (f"root={tmp_path / 'text'}",)
    command = [*arguments(recipe, tokenizer_dir, tmp_path / "out", *more), "--validation-samples", "40"]
    assert prepare_data.main(command) == 0
    printed = capsys.readouterr().out
    domains = load_manifest(tmp_path / "out").domains
    samples = {name: (domain.train.samples, domain.validation.samples) for name, domain in domains.items()}
    assert samples["small"][0] < samples["small"][1] and samples["large"][0] > samples["large"][1], samples
    warned = [line for line in printed.splitlines() if line.startswith("warning: fewer samples to train on")]
    assert len(warned) == 1 and f"small ({samples['small'][0]} and {samples['small'][1]})" in warned[0]
    assert "--validation-samples" in warned[0]


def test_errors_are_one_line_and_exit_with_2(
    tokenizer_dir: Path, tmp_path: Path, recipe_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare_data.main(arguments(recipe_path, tokenizer_dir, tmp_path / "out", "root")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: override 'root': write it as key.path=value")
    assert error.count("\n") == 1


def test_an_interrupt_prints_how_to_continue(
    tokenizer_dir: Path,
    tmp_path: Path,
    recipe_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "prepare", interrupted)
    assert prepare_data.main(arguments(recipe_path, tokenizer_dir, tmp_path / "out")) == 130
    assert "start the same command again to continue" in capsys.readouterr().err


def test_a_line_has_speed_and_time_left_of_only_this_run() -> None:
    line = prepare_data.progress_line("a", 600_000_000, 1_000_000_000, new=100_000_000, seconds=10.0)
    assert line == "a: 600 of 1,000 MB (60%), 10.0 MB/s, 40 s left"
    assert prepare_data.progress_line("a", 0, 10, new=0, seconds=0.0).endswith("time left unknown")


def test_lines_come_now_and_then_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(prepare_data.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=100)
    with prepare_data.Display(console, ["a"]) as display:
        for second in range(100):
            now[0] = float(second)
            display.update("a", 500_000_000 + second * 1_000_000, 1_000_000_000)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().strip().splitlines()
    assert [line.strip() for line in lines] == [
        "a: 530 of 1,000 MB (53%), 1.0 MB/s, 470 s left",
        "a: 560 of 1,000 MB (56%), 1.0 MB/s, 440 s left",
        "a: 590 of 1,000 MB (59%), 1.0 MB/s, 410 s left",
    ]
