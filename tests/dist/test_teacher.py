"""The teacher's options: the numbers stay as they are to the bit, and what is gathered is what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddk_ds.run_files import read_events
from tests.dist.ranks import run_ranks
from tests.dist.resume_worker import run_dir
from tests.dist.teacher_worker import TEACHER
from tools.bench.small_run import without_clock, write_config

ZERO = {"stage3_param_persistence_threshold": 0}
SMALL_BUCKETS = {"zero_optimization": {**ZERO, "reduce_bucket_size": 20_000, "stage3_prefetch_bucket_size": 10_000}}


def taught(**section: Any) -> tuple[str, dict[str, Any]]:
    return "kd", {"teacher": section}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": taught(),
    "four a pass": taught(micro_batches_per_pass=4),
    "three a pass": taught(micro_batches_per_pass=3),
    "node": taught(shard_within="node"),
    "gpu": taught(shard_within="gpu"),
    "node, four a pass": taught(shard_within="node", micro_batches_per_pass=4),
    "small buckets": ("kd", {"deepspeed": SMALL_BUCKETS}),
    "in parts": taught(whole_layers=False),
    "checkpointing": ("kd", {"student": {"gradient_checkpointing": True}}),
    "selective checkpointing": ("kd", {"student": {"gradient_checkpointing": "selective"}}),
    "filters": ("ted_filters", {}),
    "filters, two a pass": ("ted_filters", {"teacher": {"micro_batches_per_pass": 2}}),
    "student in parts": ("kd", {"student": {"whole_layers": False}}),
    "operation by operation": ("kd", {"optimizer": {"fused": False}}),
    "int8": taught(quantize="int8"),
    "int8, four a pass": taught(quantize="int8", micro_batches_per_pass=4),
    "int8 in bf16": ("kd", {"train": {"precision": "bf16"}, "teacher": {"quantize": "int8"}}),
    "bf16": ("kd", {"train": {"precision": "bf16"}}),
}
ROUNDED = ("student in parts", "operation by operation")
OTHERS = ("filters", "filters, two a pass", "int8", "int8, four a pass", "int8 in bf16", "bf16", *ROUNDED)
PAIRS = [("plain", name) for name in CASES if name not in OTHERS]
PAIRS += [("filters", "filters, two a pass"), ("int8", "int8, four a pass")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By case, on four ranks that are two nodes of two."""
    folder = str(tmp_path_factory.mktemp("teacher"))
    results = run_ranks("tests.dist.teacher_worker:steps", 4, per_node=2, folder=folder, cases=list(CASES.values()))
    return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_the_numbers_stay(found: dict[str, dict[str, Any]], one: str, other: str) -> None:
    assert found[one]["losses"] == found[other]["losses"]
    assert found[other]["left"] == 0, "weights of the teacher are still whole after a step"


def gathered(found: dict[str, dict[str, Any]], case: str, links: str = "all") -> int:
    """Bytes of the teacher's weights in the third step: from the third pass on DeepSpeed keeps the norms."""
    return int(found[case]["bytes"][2][links])


def test_each_gather_serves_several_micro_batches(found: dict[str, dict[str, Any]]) -> None:
    plain = gathered(found, "plain")
    assert plain > 4 * 4 * 1e6, "four passes over a teacher of more than 10^6 parameters in float32"
    assert gathered(found, "in parts") == plain
    for case, passes in (("four a pass", 1), ("three a pass", 2)):
        assert gathered(found, case) * 4 == plain * passes, case


def test_sharded_within_a_node_nothing_goes_between_nodes(found: dict[str, dict[str, Any]]) -> None:
    assert gathered(found, "plain", "between nodes") == gathered(found, "plain")
    assert gathered(found, "node", "between nodes") == 0
    assert gathered(found, "node") == gathered(found, "plain")
    assert gathered(found, "node, four a pass") * 4 == gathered(found, "plain")
    assert gathered(found, "gpu") == 0


@pytest.mark.parametrize("name", ROUNDED)
def test_what_is_computed_in_another_way_differs_by_rounding(found: dict[str, dict[str, Any]], name: str) -> None:
    assert found[name]["losses"] != found["plain"]["losses"]
    for ours, plain in zip(found[name]["losses"], found["plain"]["losses"], strict=True):
        assert ours == pytest.approx(plain, rel=1e-5)


@pytest.mark.long
def test_compiled_layers_differ_by_rounding(found: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Torch's compiler takes most of a minute."""
    case = ("kd", {"student": {"compile_layers": True}, "teacher": {"compile_layers": True}})
    [compiled] = run_ranks("tests.dist.teacher_worker:steps", 4, per_node=2, folder=str(tmp_path), cases=[case])
    assert compiled["losses"] != found["plain"]["losses"]
    for ours, plain in zip(compiled["losses"], found["plain"]["losses"], strict=True):
        assert ours == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(("small", "plain", "in_one"), [("int8", "plain", 4), ("int8 in bf16", "bf16", 2)])
def test_eight_bits_gather_less(found: dict[str, dict[str, Any]], small: str, plain: str, in_one: int) -> None:
    """Of the layers: the embedding stays as it is, and scales come to them. (The head's own gather is not counted.)"""
    embedding = 4 * TEACHER["vocab"] * TEACHER["hidden"] * (4 if plain == "plain" else 2)
    layers, fewer = (gathered(found, name) - embedding for name in (plain, small))
    assert fewer == pytest.approx(layers / in_one, rel=0.02)
    for ours, theirs in zip(found[small]["losses"], found[plain]["losses"], strict=True):
        assert ours != theirs and ours == pytest.approx(theirs, rel=0.05), "another teacher, by a little"
    assert found[small]["left"] == 0


def test_the_run_settles_how_many_a_pass_takes(workspace: Path, tmp_path: Path) -> None:
    plain = write_config(workspace, tmp_path, name="plain", stop={"steps": 3})
    auto = write_config(workspace, tmp_path, name="auto", stop={"steps": 3}, teacher={"micro_batches_per_pass": "auto"})
    starts = [(str(config), name, None) for config, name in ((plain, "plain"), (auto, "auto"))]
    run_ranks("tests.dist.resume_worker:run_all", 2, starts=starts)
    settled, without = run_dir(str(auto), "auto"), run_dir(str(plain), "plain")
    assert without_clock(settled) == without_clock(without)
    told = [event["micro_batches_per_pass"] for run in (settled, without) for event in read_events(run)[:1]]
    assert told == [2, 1]
