"""Made-up text and recipes for the tests of the data room."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ddk_ds.data.prepare import Plan

PLAN = Plan(sequence_length=32, validation_samples=7)


def make_texts(seed: int, count: int, num_words: int = 60) -> list[str]:
    """Return `count` distinct documents of made-up words."""
    source = random.Random(seed)
    words = ["".join(source.choices("abcdefghijklmnop", k=source.randint(2, 7))) for _ in range(200)]
    return [
        f"{seed}/{number} " + " ".join(source.choices(words, k=source.randint(num_words // 2, num_words)))
        for number in range(count)
    ]


def write_recipe(path: Path, domains: dict[str, Any]) -> Path:
    """Write a recipe file with these domains, whose paths are relative to it."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create({"domains": domains})), encoding="utf-8")
    return path
