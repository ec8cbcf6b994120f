"""Texts of benchmarks in documents, beside sets of n-grams by hand; and what a preparation keeps out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ddk_ds.commands import prepare_command
from ddk_ds.data import contamination as contamination_module
from ddk_ds.data.contamination import Contamination
from ddk_ds.data.manifest import load_manifest
from ddk_ds.data.prepare import prepare
from ddk_ds.data.recipe import load_recipe
from ddk_ds.errors import ConfigError
from tests.unit.data.corpus import PLAN, make_texts, write_recipe
from tests.unit.data.test_data_prepare import write_lines
from tests.unit.data.test_near_duplicates import shards_of

QUESTION = "Which of these five rivers flows through the largest number of countries on its way to the sea?"


def test_a_benchmark_is_found_by_n_grams_of_its_own_size() -> None:
    found = Contamination({"rivers": [QUESTION] * 30, "short": ["one two three"] + ["a b c d e f g h i j"] * 30})
    assert found.sizes == {"rivers": 13, "short": 10}
    assert found.too_short == {"rivers": 0, "short": 1}
    words = QUESTION.rstrip("?").split()
    texts = [
        "x " + " ".join(words[2:15]).upper() + ", y",
        " ".join(words[2:14]) + " y " + " ".join(words[14:]),
        "- ".join("abcdefghij") + " z",
        "a b c d e f g h i k",
        "one two three",
        "",
    ]
    assert found(texts) == ["rivers", "", "short", "", "", ""]
    # Fewer words than 8 are no n-gram, and what both have is the first one's.
    both = Contamination({"few": ["a b c"], "first": ["a b c d e f g h"], "second": ["a b c d e f g h"]})
    assert both.sizes == {"few": 8, "first": 8, "second": 8} and both.too_short["few"] == 1
    assert both(["a b c", "a b c d e f g h"]) == ["", "first"]


def test_all_n_grams_in_common_are_found_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of two letters make n-grams in common by chance; pieces of a text must lose none at their ends."""
    monkeypatch.setattr(contamination_module, "_PIECE_CHARS", 40)
    source = random.Random(4)
    texts = ["".join(source.choices("ab", k=14)) for _ in range(220)]
    spaced = [" ".join(text) for text in texts]
    known, asked = texts[:70], texts[70:]
    found = Contamination({"one": spaced[:70]})
    assert found.sizes == {"one": 13}
    grams = {text[begin : begin + 13] for text in known for begin in (0, 1)}
    expected = ["one" if any(text[begin : begin + 13] in grams for begin in (0, 1)) else "" for text in asked]
    assert 1 < expected.count("one") < 100
    assert found(spaced[70:]) == expected
    assert found([f"{'z ' * number}{spaced[0]}" for number in range(40)]) == ["one"] * 40


def test_documents_with_a_benchmarks_text_are_dropped_and_named(tokenizer_dir: Path, tmp_path: Path) -> None:
    clean, other = make_texts(1, 40), make_texts(2, 40)
    write_lines(tmp_path / "a.jsonl", [*clean[:9], f"an own text. {QUESTION} Its end", *clean[9:]])
    write_lines(tmp_path / "b.jsonl", [f"{QUESTION} {number}" for number in range(3)] + other)
    domains = {name: {"sources": [f"{name}.jsonl"]} for name in ("a", "b")}
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", domains), ["decontaminate=paper", "dedup=minhash"])
    finder = Contamination({"rivers": [QUESTION]})
    manifest = prepare(recipe, tokenizer_dir, tmp_path / "out", PLAN, contamination=finder)
    assert {name: dict(domain.contaminated) for name, domain in manifest.domains.items()} == {
        "a": {"rivers": 1},
        "b": {"rivers": 3},
    }
    loaded = load_manifest(tmp_path / "out")
    assert loaded.domains == manifest.domains
    assert loaded.settings["dedup"] == {"ngram_words": 5, "buckets": 14, "hashes": 8}
    assert (loaded.settings["decontaminate"], loaded.settings["seed"]) == (finder.fingerprint, PLAN.seed)
    column = prepare_command.losses(manifest).columns[-1]
    assert (column.header, list(column.cells)) == ("text of\nrivers", ["1", "3"])
    for name, texts in (("a", clean), ("b", other)):
        write_lines(tmp_path / f"{name}.jsonl", texts)
    prepare(load_recipe(tmp_path / "r.yaml"), tokenizer_dir, tmp_path / "expected", PLAN)
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "expected")
    with pytest.raises(ConfigError, match="decontaminate is 'paper': give the texts"):
        prepare(recipe, tokenizer_dir, tmp_path / "none", PLAN)
