"""Fixtures: a tiny model with its tokenizer and shards, every benchmark's files, and a network that fails the test."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.data.prepare import Plan, prepare
from ddk_ds.data.recipe import load_recipe
from ddk_ds.data.tokenizer import save_tokenizer, train_tokenizer
from tests.dist.tiny import save_model
from tests.unit.data.corpus import make_texts, write_recipe


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with model/ (a random Llama with its tokenizer) and shards/ of two domains."""
    root = tmp_path_factory.mktemp("tiny")
    for seed, name in enumerate(("plain", "accents")):
        texts = [text.replace("a", "ä") if seed else text for text in make_texts(seed, 60)]
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sources = {name: {"sources": [f"{name}.jsonl"]} for name in ("plain", "accents")}
    recipe = load_recipe(write_recipe(root / "recipe.yaml", sources))
    save_tokenizer(train_tokenizer(recipe, 300), root / "model")
    plan = Plan(sequence_length=32, validation_samples=9, workers=1)
    prepare(recipe, root / "model", root / "shards", plan)
    # The head has 8 rows more than the tokenizer has tokens.
    save_model(root / "model", vocab=308, tied=False, seed=3)
    return root


@pytest.fixture(scope="session")
def benchmark_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory for --data with every benchmark's files."""
    from tests.unit.evaluation.benchmarks import write_benchmarks  # imports the harness

    root = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(root)
    return root


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that resolves a name or opens a connection."""
    requests: list[Any] = []

    def refuse(*arguments: Any, **_options: Any) -> Any:
        requests.append(arguments)
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    yield
    assert not requests


@pytest.fixture(scope="session")
def bwrap() -> None:
    """Skip a test that runs generated programs on a machine without bubblewrap."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed (apt-get install bubblewrap)")
