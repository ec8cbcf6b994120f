"""The shipped recipes of the paper's domains, unchanged, on small files of the published schemas and layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from ddk_ds.data.prepare import Plan, prepare
from ddk_ds.data.recipe import list_files, load_recipe
from ddk_ds.errors import ConfigError
from tests.unit.data.corpus import make_texts

RECIPES = Path(__file__).parents[3] / "configs/data"
PAPER = {
    "arxiv": "arxiv/arxiv_023827cd.jsonl",
    "book": "book/book.jsonl",
    "c4": "c4/c4-train.00000-of-01024.jsonl",
    "commoncrawl": "common_crawl/2019-30/en_head_0000.json.gz.dedup.classifier.jsonl.zst",
    "github": "github/filtered_27f05c041a1c401783f90b9415e40e4b.sampled.jsonl",
    "stackexchange": "stackexchange/stackexchange.jsonl.zst",
    "wikipedia": "wikipedia/wiki.jsonl",
    "chinese_books": "chinese_books/part-000.jsonl",
    "chinese_commoncrawl": "chinese_commoncrawl/2021-04/zh_head_0000.jsonl.zst",
    "openwebmath": "open-web-math/data/train-00000-of-00114-5a023365406cb20f.parquet",
}
STACK = {
    name: f"data/{folder}/train-00000-of-00010.parquet"
    for name, folder in (
        ("python", "Python"),
        ("java", "Java"),
        ("typescript", "TypeScript"),
        ("csharp", "C-Sharp"),
    )
}
TEN = {name: f"{name}.jsonl" for name in PAPER}
COUNT = 40


def write_texts(path: Path, texts: list[str], field: str) -> None:
    """Write a file in the schema of its suffix: RedPajama's lines, or parquet with other columns next to the text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        columns = {"url": ["u"] * len(texts), field: texts, "metadata": ["{}"] * len(texts)}
        parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
        return
    meta = {"timestamp": "2023-03-01", "url": "u", "language": "en", "source": "s"}
    data = "".join(json.dumps({field: text, "meta": meta}, ensure_ascii=False) + "\n" for text in texts).encode()
    path.write_bytes(zstandard.compress(data) if path.suffix == ".zst" else data)


@pytest.fixture(params=["paper", "stack_v2", "ten_domains", "ten_domains_equal"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, dict[str, list[str]]]:
    """Write small files for a shipped recipe; return (recipe, root, texts by domain)."""
    layouts = {"paper": (PAPER, "text"), "stack_v2": (STACK, "content")}
    layout, field = layouts.get(request.param, (TEN, "text"))
    texts = {}
    for seed, (name, path) in enumerate(layout.items()):
        texts[name] = make_texts(seed, COUNT)
        if name.startswith("chinese"):
            texts[name] = [f"第{number}篇" + "新しい漢字文" * 9 + text[:40] for number, text in enumerate(texts[name])]
        write_texts(tmp_path / "text" / path, texts[name], field)
    return RECIPES / f"{request.param}.yaml", tmp_path / "text", texts


def test_a_recipe_runs_unchanged_with_the_root_from_the_environment(
    corpus: tuple[Path, Path, dict[str, list[str]]],
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, root, texts = corpus
    monkeypatch.setenv("DDK_TEXT", str(root))
    manifest = prepare(load_recipe(path), tokenizer_dir, tmp_path / "out", Plan(16, validation_samples=3))
    assert set(manifest.domains) == set(texts)
    for name, domain in manifest.domains.items():
        assert domain.train.documents + domain.validation.documents == COUNT
        assert domain.train.bytes + domain.validation.bytes == sum(len(text.encode()) for text in texts[name])


def test_the_root_can_be_an_override(corpus: tuple[Path, Path, dict[str, list[str]]], tmp_path: Path) -> None:
    path, root, texts = corpus
    files = list_files(load_recipe(path, [f"root={root}"]))
    assert {name: len(found) for name, found in files.items()} == dict.fromkeys(texts, 1)


def test_a_missing_root_is_named(
    corpus: tuple[Path, Path, dict[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DDK_TEXT", raising=False)
    with pytest.raises(ConfigError, match=r"recipe .*DDK_TEXT.*; set the variable, or give the key"):
        load_recipe(corpus[0])


def test_every_shipped_recipe_is_tested() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {
        *("demo", "paper", "stack_v2", "ten_domains", "ten_domains_equal")
    }
