"""The teacher makes as few passes as memory allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddk_ds.config import Config, make_config
from ddk_ds.engine.memory_estimate import estimate_memory
from ddk_ds.engine.model_files import configured_files, model_shape
from ddk_ds.train.teacher_passes import settled_teacher

MODELS = Path(__file__).parents[3] / "configs/models"
SHAPES = tuple(model_shape(configured_files(MODELS / f"Qwen1.5-{size}.json")) for size in ("1.8B", "14B"))
VOCAB, RANKS, ON_NODE, MICRO_BATCHES = 151_646, 16, 8, 16


def config_of(**teacher: Any) -> Config:
    values = {"student": {"path": "s"}, "teacher": {"path": "t", **teacher}, "data": {"path": "d"}}
    return make_config({"name": "run", "stop": {"steps": 4000}, **values}, "test")


def needed(per_pass: int) -> int:
    config = config_of(micro_batches_per_pass=per_pass)
    return estimate_memory(config, *SHAPES, VOCAB, RANKS, "cuda", ON_NODE).device_bytes


def settled(usable: float, **teacher: Any) -> int:
    config = config_of(micro_batches_per_pass="auto", **teacher)
    found = settled_teacher(config, SHAPES, VOCAB, RANKS, ON_NODE, "cuda", usable)
    assert found.teacher is not None and found.teacher.micro_batches_per_pass != "auto"
    return found.teacher.pass_size


@pytest.mark.parametrize(
    ("holds", "per_pass"),
    [(MICRO_BATCHES, 16), (15, 8), (8, 8), (7, 6), (5, 4), (2, 2), (1, 1)],
)
def test_the_most_that_memory_holds(holds: int, per_pass: int) -> None:
    """16 micro-batches are 16 in one pass, 8 in two, 6 in three (6, 6, 4), 4 in four, ..."""
    assert settled(needed(holds)) == per_pass


def test_one_each_where_no_more_fit_or_nothing_is_gathered() -> None:
    assert settled(0.0) == 1
    assert settled(1e15, shard_within="gpu") == 1
    assert settled(1e15, shard_within="node") == MICRO_BATCHES


def test_auto_counts_as_the_least_until_it_is_settled() -> None:
    teacher = config_of(micro_batches_per_pass="auto", shard_within="auto").teacher
    assert teacher is not None and (teacher.pass_size, teacher.place) == (1, "world")


def test_the_first_place_that_memory_holds() -> None:
    def bytes_of(place: str) -> int:
        return estimate_memory(config_of(shard_within=place), *SHAPES, VOCAB, RANKS, "cuda", ON_NODE).device_bytes

    def place(usable: float, per_pass: Any = 1) -> tuple[str, int]:
        config = config_of(shard_within="auto", micro_batches_per_pass=per_pass)
        teacher = settled_teacher(config, SHAPES, VOCAB, RANKS, ON_NODE, "cuda", usable).teacher
        assert teacher is not None
        return teacher.shard_within, teacher.pass_size

    whole, of_node = bytes_of("gpu"), bytes_of("node")
    assert whole > of_node > bytes_of("world")
    found = [place(usable)[0] for usable in (whole, whole - 1, of_node, of_node - 1, 0)]
    assert found == ["gpu", "node", "node", "world", "world"]
    assert place(1e15, "auto") == ("gpu", 1), "nothing is gathered, so several micro-batches a pass save nothing"
    assert place(whole - 1, "auto")[0] == "node" and place(whole - 1, "auto")[1] > 1
    # A CPU's memory holds the host's part as well.
    on_cpu = estimate_memory(config_of(shard_within="gpu"), *SHAPES, VOCAB, RANKS, "cpu", ON_NODE).total
    config = config_of(shard_within="auto")
    for usable, expected in ((on_cpu, "gpu"), (on_cpu - 1, "node")):
        settled_on_cpu = settled_teacher(config, SHAPES, VOCAB, RANKS, ON_NODE, "cpu", usable).teacher
        assert settled_on_cpu is not None and settled_on_cpu.shard_within == expected
