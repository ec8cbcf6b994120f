"""The teacher's perplexities: read back only for the same teacher, measured in the same way; worse than guessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_ds.config import Config
from ddk_ds.data.teacher_perplexities import PerplexityCache
from ddk_ds.data.teacher_place import LocalPlace
from ddk_ds.train.run_dir import run_identity
from ddk_ds.train.validation import perplexity_conditions, worse_than_guessing
from tests.unit.train.short_config import config_of

CONTENT: dict[str, Any] = {
    "student": "s",
    "teacher": "t",
    "tokenizer": "k",
    "attention": {"student": "sdpa", "teacher": "sdpa"},
    "domains": {"code": "a/b"},
    "filters": None,
    "schedule": None,
}


def identity(folder: Path, content: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    return run_identity(config_of(folder, **sections), {**CONTENT, **(content or {})})


@pytest.mark.parametrize(
    "other",
    [
        {"teacher": {"quantize": "int8"}},
        {"teacher": {"quantize": "int8_dynamic"}},
        {"teacher": {"quantize": "fp8"}},
        {"teacher": {"quantize": "int8", "quantize_skip_layers": [0]}},
        {"teacher": {"compile_layers": True}},
        {"teacher": {"trust_remote_code": True}},
        {"train": {"precision": "fp32"}},
        {"data": {"sequence_length": 64}},
        {"data": {"validation_samples": 3}},
        {"content": {"teacher": "u"}},
        {"content": {"tokenizer": "l"}},
        {"content": {"attention": {"student": "sdpa", "teacher": "eager"}}},
    ],
    ids=str,
)
def test_what_the_number_depends_on_is_part_of_the_key(tmp_path: Path, other: dict[str, Any]) -> None:
    cache = PerplexityCache(LocalPlace(tmp_path), perplexity_conditions(identity(tmp_path), {"torch": "1"}))
    cache.write("domain", 3.0)
    assert cache.read("domain") == 3.0
    changed = perplexity_conditions(identity(tmp_path, **other), {"torch": "1"})
    assert PerplexityCache(LocalPlace(tmp_path), changed).read("domain") is None


def test_a_domains_own_teacher_stands_in_the_place_of_the_runs(tmp_path: Path) -> None:
    """A run of several teachers finds what each fill of the cache has measured."""
    of_run = identity(tmp_path, {"by_domain": {"code": "u eager"}})
    of_fill = identity(tmp_path, {"by_domain": None, "teacher": "u"})
    own = {**of_run, "content.teacher": "u"}
    assert perplexity_conditions(own, {}) == perplexity_conditions(of_fill, {}) != perplexity_conditions(of_run, {})


def test_every_option_of_the_teacher_is_part_of_the_key_unless_it_changes_no_number(tmp_path: Path) -> None:
    free = {"path", "by_domain", "attn_implementation", "shard_within", "micro_batches_per_pass", "whole_layers"}
    teacher = Config.model_fields["teacher"].annotation
    options = set(teacher.__args__[0].model_fields)  # type: ignore[union-attr]
    known = perplexity_conditions(identity(tmp_path), {})
    assert {key.removeprefix("teacher.") for key in known if key.startswith("teacher.")} == options - free


def test_an_option_of_a_later_version_is_part_of_the_key(tmp_path: Path) -> None:
    later = {**identity(tmp_path), "tokenizer.new_option": 1, "data.new_option": 1, "new_section.option": 1}
    assert perplexity_conditions(later, {}) == {
        **perplexity_conditions(identity(tmp_path), {}),
        **{key: 1 for key in later if "new_" in key},
    }


def test_other_versions_measure_again(tmp_path: Path) -> None:
    keys = [perplexity_conditions(identity(tmp_path), {"transformers": version}) for version in ("4", "5")]
    PerplexityCache(LocalPlace(tmp_path), keys[0]).write("domain", 3.0)
    assert PerplexityCache(LocalPlace(tmp_path), keys[1]).read("domain") is None


def test_runs_of_a_comparison_share_the_measurement(tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [
        {"method": "kd"},
        {"seed": 5},
        {"loss": {"gamma": 0.5}},
        {"mixture": {"alpha": 0.1}},
        {"optimizer": {"learning_rate": 1e-3}},
        {"stop": {"intervals": 9}},
        {"student": {"gradient_checkpointing": True}},
        {"train": {"micro_batch_samples": 2}},
        {"content": {"student": "r", "domains": {"other": "c/d"}}},
    ]
    key = perplexity_conditions(identity(tmp_path), {})
    for other in others:
        assert perplexity_conditions(identity(tmp_path, **other), {}) == key, other


def test_a_teacher_that_is_worse_than_guessing_is_named() -> None:
    names = ["code", "web", "news"]
    assert worse_than_guessing(np.array([12.0, 99.0, 100.0]), names, 100) == ""
    warning = worse_than_guessing(np.array([12.0, 100.5, 1e77]), names, 100)
    assert "web 100" in warning and "news" in warning and "code" not in warning
