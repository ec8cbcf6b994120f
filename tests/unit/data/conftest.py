"""A small corpus of three domains, a tokenizer trained on it, and the data prepared from both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddk_ds.data.prepare import prepare
from ddk_ds.data.recipe import load_recipe
from ddk_ds.data.tokenizer import save_tokenizer, train_tokenizer
from tests.unit.data.corpus import PLAN, make_texts, write_recipe


@pytest.fixture(scope="session")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a recipe with the domains `small` (jsonl), `tree` (text files), `large` (jsonl): 60, 80, 200 documents."""
    root = tmp_path_factory.mktemp("corpus")
    for seed, (name, count) in enumerate((("small", 60), ("large", 200))):
        lines = [json.dumps({"text": text}) for text in make_texts(seed, count)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for number, text in enumerate(make_texts(2, 80)):
        file = root / "tree" / f"{number % 7}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return write_recipe(
        root / "recipe.yaml",
        {
            "small": {"sources": ["small.jsonl"]},
            "tree": {"sources": ["tree/**/*.txt"]},
            "large": {"sources": ["large.jsonl"]},
        },
    )


@pytest.fixture(scope="session")
def tokenizer_dir(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a byte-level BPE of 400 tokens on the recipe and return its directory."""
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(load_recipe(recipe_path), 400), directory)
    return directory


@pytest.fixture(scope="session")
def prepared(recipe_path: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare the corpus by PLAN and return the directory; tests that damage it copy it first."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(load_recipe(recipe_path), tokenizer_dir, out, PLAN)
    return out
