"""Near duplicates: pairs that MinHash finds beside Jaccard similarities by hand, and what is left of planted ones."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_ds.data import long_documents, reading
from ddk_ds.data.manifest import load_manifest
from ddk_ds.data.near_duplicates import NearKeys
from ddk_ds.data.prepare import prepare
from ddk_ds.data.recipe import MinHashOptions, load_recipe
from ddk_ds.data.workdir import WorkDir
from tests.unit.data.corpus import PLAN, write_recipe
from tests.unit.data.test_data_prepare import files_of, write_lines

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_text(source: random.Random, words: int = 150) -> str:
    """Return a text of words that no other text is likely to have in the same order."""
    return " ".join("".join(source.choices(LETTERS, k=5)) for _ in range(words))


def edited(source: random.Random, text: str, edits: int) -> str:
    """Return a copy with other case and punctuation, and with other words at `edits` places."""
    words = text.split()
    for place in source.sample(range(len(words)), edits):
        words[place] = "".join(source.choices(LETTERS, k=6))
    return ", ".join(words).capitalize() + "."


def jaccard(one: str, other: str, size: int = 5) -> float:
    """Return the similarity of two texts' sets of n-grams, by its definition."""
    sets = []
    for text in (one, other):
        words = re.findall("[a-z]+", text.lower())
        sets.append({tuple(words[begin : begin + size]) for begin in range(len(words) - size + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_pairs_are_found_as_often_as_their_similarity_says() -> None:
    source = random.Random(1)
    near = NearKeys(MinHashOptions())
    expected, found = 0.0, 0
    for number in range(120):
        text = make_text(source, 80)
        copy = edited(source, text, number % 6 + 1)
        similarity = jaccard(text, copy)
        share = bool(set(near([text])[0]) & set(near([copy])[0]))
        expected += 1 - (1 - similarity**8) ** 14
        found += share
        assert share or similarity < 0.93, similarity
    assert 40 < expected < 110  # the edits reach from what is surely found to what is hardly found
    assert abs(found - expected) < 3 * np.sqrt(120 / 4)
    texts = [make_text(source) for _ in range(60)]
    keys = near(texts)
    assert all(len(of_text) == 14 for of_text in keys)
    for one, other in combinations(range(60), 2):
        assert jaccard(texts[one], texts[other]) == 0 and not set(keys[one]) & set(keys[other])


def test_texts_without_blanks_and_numbers_and_short_ones() -> None:
    near = NearKeys(MinHashOptions(buckets=3, hashes=2))
    chinese = "今天天气很好我们一起去公园散步吧"
    assert set(near([chinese])[0]) & set(near([chinese + "。"])[0])
    assert near(["one two three four", ""]) == [[], []]
    sums = [f"what is the sum of {number} and {number + 1} in words" for number in (3, 40)]
    alike = NearKeys(MinHashOptions(buckets=1, hashes=8, ngram_words=1))(sums)
    assert alike[0] != alike[1]  # datatrove's own settings would make every number the same


def plant(folder: Path) -> dict[str, list[str]]:
    """Write domains `a` and `b` with near copies in `a`, in `b` and of `a` in `b`; return what is to be kept."""
    source = random.Random(2)
    first, second = [[make_text(source) for _ in range(40)] for _ in range(2)]
    lines = {"a": list(first), "b": list(second)}
    for number in range(8):
        lines["a"].insert(3 * number + 1, edited(source, first[0], 1))
        lines["b"].append(edited(source, second[number], 1))
        lines["b"].insert(2 * number, edited(source, first[number + 20], 1))
    for name, texts in lines.items():
        write_lines(folder / f"{name}.jsonl", texts)
    return {"a": first, "b": second}


def recipe_with(folder: Path, dedup: str, kept: dict[str, list[str]] | None = None) -> Any:
    domains = {name: {"sources": [f"{name}.jsonl"]} for name in ("a", "b")}
    path = write_recipe(folder / "r.yaml", domains)
    for name in kept or {}:
        write_lines(folder / f"{name}.jsonl", kept[name] if kept else [])
    return load_recipe(path, [f"dedup={dedup}"])


def shards_of(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(root).items() if name != "domains.json"}


@pytest.mark.parametrize("parts", ["whole", "cut"])
def test_planted_copies_leave_no_trace_in_any_domain_or_split(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: str
) -> None:
    """The shards are those of a preparation of the texts that are to be kept; also where documents come in parts."""
    if parts == "cut":
        monkeypatch.setattr(long_documents, "PART_CHARS", 300)
        monkeypatch.setattr(reading, "BATCH_BYTES", 700)
    kept = plant(tmp_path)
    manifest = prepare(recipe_with(tmp_path, "minhash"), tokenizer_dir, tmp_path / "out", PLAN)
    dropped = {name: domain.dropped for name, domain in manifest.domains.items()}
    assert (dropped["a"].near_duplicates, dropped["b"].near_duplicates) == (8, 16)
    assert load_manifest(tmp_path / "out").domains == manifest.domains
    prepare(recipe_with(tmp_path, "exact", kept), tokenizer_dir, tmp_path / "expected", PLAN)
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "expected")


def test_an_interruption_changes_nothing_of_what_is_near(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BATCH_BYTES", 2000)
    monkeypatch.setattr(reading, "PART_SECONDS", 0.0)
    plant(tmp_path)
    recipe = recipe_with(tmp_path, "minhash")
    prepare(recipe, tokenizer_dir, tmp_path / "whole", PLAN)
    is_near, calls = WorkDir.is_near, []

    def failing(self: WorkDir, keys: list[int]) -> bool:
        calls.append(keys)
        if len(calls) in (20, 55, 80):
            raise KeyboardInterrupt
        return is_near(self, keys)

    monkeypatch.setattr(WorkDir, "is_near", failing)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe, tokenizer_dir, tmp_path / "out", PLAN)
    prepare(recipe, tokenizer_dir, tmp_path / "out", PLAN)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.long("starts three processes that import the tokenizer and datatrove")
def test_three_workers_find_what_one_finds(tokenizer_dir: Path, tmp_path: Path) -> None:
    plant(tmp_path)
    recipe = recipe_with(tmp_path, "minhash")
    for workers in (1, 3):
        prepare(recipe, tokenizer_dir, tmp_path / f"out{workers}", replace(PLAN, workers=workers))
    assert files_of(tmp_path / "out1") == files_of(tmp_path / "out3")
