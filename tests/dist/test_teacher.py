"""The teacher's options change no number by a single bit, and reduce the gathered bytes as they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddk_ds.run_files import read_events
from tests.dist.ranks import run_ranks
from tests.dist.resume_worker import run_dir
from tests.dist.teacher_worker import TEACHER
from tools.bench.small_run import without_clock, write_config

pytestmark = pytest.mark.long(
    "twenty-four runs of four ranks, 110 s of CPU; tests/dist/test_parity.py has the plain case"
)

ZERO = {"stage3_param_persistence_threshold": 0}
SMALL_BUCKETS = {"zero_optimization": {**ZERO, "reduce_bucket_size": 20_000, "stage3_prefetch_bucket_size": 10_000}}


def with_teacher(**section: Any) -> tuple[str, dict[str, Any]]:
    return "kd", {"teacher": section}


def fp8_teacher(**section: Any) -> tuple[str, dict[str, Any]]:
    return "kd", {"train": {"precision": "bf16"}, "teacher": {"quantize": "fp8", **section}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": with_teacher(),
    "four a pass": with_teacher(micro_batches_per_pass=4),
    "three a pass": with_teacher(micro_batches_per_pass=3),
    "node": with_teacher(shard_within="node"),
    "gpu": with_teacher(shard_within="gpu"),
    "gpu, four together": with_teacher(shard_within="gpu", micro_batches_per_pass=4),
    "node, four a pass": with_teacher(shard_within="node", micro_batches_per_pass=4),
    "small buckets": ("kd", {"deepspeed": SMALL_BUCKETS}),
    "in parts": with_teacher(whole_layers=False),
    "checkpointing": ("kd", {"student": {"gradient_checkpointing": True}}),
    "inputs on the host": ("kd", {"student": {"gradient_checkpointing": True, "offload_activations": "cpu"}}),
    "selective checkpointing": ("kd", {"student": {"gradient_checkpointing": "selective"}}),
    "filters": ("ted_filters", {}),
    "filters, two a pass": ("ted_filters", {"teacher": {"micro_batches_per_pass": 2}}),
    "filters, gpu": ("ted_filters", {"teacher": {"micro_batches_per_pass": 2, "shard_within": "gpu"}}),
    "student in parts": ("kd", {"student": {"whole_layers": False}}),
    "operation by operation": ("kd", {"optimizer": {"fused": False}}),
    "int8": with_teacher(quantize="int8"),
    "int8, four a pass": with_teacher(quantize="int8", micro_batches_per_pass=4),
    "int8, gpu": with_teacher(quantize="int8", shard_within="gpu"),
    "int8 in bf16": ("kd", {"train": {"precision": "bf16"}, "teacher": {"quantize": "int8"}}),
    "fp8": fp8_teacher(),
    "fp8, four a pass": fp8_teacher(micro_batches_per_pass=4),
    "fp8, gpu": fp8_teacher(shard_within="gpu"),
    "bf16": ("kd", {"train": {"precision": "bf16"}}),
}
ROUNDED = ("student in parts", "operation by operation")
PAIRS = [("filters", "filters, two a pass"), ("filters", "filters, gpu")]
PAIRS += [("int8", "int8, four a pass"), ("int8", "int8, gpu"), ("fp8", "fp8, four a pass"), ("fp8", "fp8, gpu")]
OTHERS = {name for pair in PAIRS for name in pair} | {"int8 in bf16", "bf16", *ROUNDED}
PAIRS += [("plain", name) for name in CASES if name not in OTHERS]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of `teacher_worker.steps` by case, on four ranks that are two nodes of two."""
    folder = str(tmp_path_factory.mktemp("teacher"))
    by_case = run_ranks("tests.dist.teacher_worker:steps", 4, per_node=2, folder=folder, cases=list(CASES.values()))
    return dict(zip(CASES, by_case, strict=True))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_the_losses_are_equal(results: dict[str, dict[str, Any]], one: str, other: str) -> None:
    assert results[one]["losses"] == results[other]["losses"]
    assert results[other]["left"] == 0, "weights of the teacher are still gathered after a step"


def gathered(results: dict[str, dict[str, Any]], case: str, links: str = "all") -> int:
    """Return the bytes of the teacher's weights gathered in the third step, since DeepSpeed keeps the norms by then."""
    return int(results[case]["bytes"][2][links])


def test_each_gather_serves_several_micro_batches(results: dict[str, dict[str, Any]]) -> None:
    plain = gathered(results, "plain")
    assert plain > 4 * 4 * 1e6, "four passes over a teacher of more than 10^6 parameters in float32"
    assert gathered(results, "in parts") == plain
    for case, passes in (("four a pass", 1), ("three a pass", 2)):
        assert gathered(results, case) * 4 == plain * passes, case


def test_sharded_within_a_node_nothing_goes_between_nodes(results: dict[str, dict[str, Any]]) -> None:
    assert gathered(results, "plain", "between nodes") == gathered(results, "plain")
    assert gathered(results, "node", "between nodes") == 0
    assert gathered(results, "node") == gathered(results, "plain")
    assert gathered(results, "node, four a pass") * 4 == gathered(results, "plain")
    assert gathered(results, "gpu") == gathered(results, "gpu, four together") == 0


@pytest.mark.parametrize("name", ROUNDED)
def test_another_order_of_operations_differs_by_rounding(results: dict[str, dict[str, Any]], name: str) -> None:
    assert results[name]["losses"] != results["plain"]["losses"]
    for ours, plain in zip(results[name]["losses"], results["plain"]["losses"], strict=True):
        assert ours == pytest.approx(plain, rel=1e-5)


@pytest.mark.long("compiling the layers takes a minute")
def test_compiled_layers_differ_by_rounding(results: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """So does a teacher that is complete on each rank, and compiled as a whole."""
    teachers = {"compile_layers": True}, {"compile_layers": True, "shard_within": "gpu"}
    cases = [("kd", {"student": {"compile_layers": True}, "teacher": teacher}) for teacher in teachers]
    found = run_ranks("tests.dist.teacher_worker:steps", 4, per_node=2, folder=str(tmp_path), cases=cases)
    for compiled in found:
        assert compiled["losses"] != results["plain"]["losses"]
        for ours, plain in zip(compiled["losses"], results["plain"]["losses"], strict=True):
            assert ours == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("small", "plain", "in_one"), [("int8", "plain", 4), ("int8 in bf16", "bf16", 2), ("fp8", "bf16", 2)]
)
def test_eight_bits_gather_less(results: dict[str, dict[str, Any]], small: str, plain: str, in_one: int) -> None:
    """Layers in 8 bits gather 2 or 4 times fewer bytes, apart from their scales; the embedding keeps its dtype."""
    embedding = 4 * TEACHER["vocab"] * TEACHER["hidden"] * (4 if plain == "plain" else 2)
    layers, fewer = (gathered(results, name) - embedding for name in (plain, small))
    assert fewer == pytest.approx(layers / in_one, rel=0.02)
    for ours, theirs in zip(results[small]["losses"], results[plain]["losses"], strict=True):
        assert ours != theirs and ours == pytest.approx(theirs, rel=0.05), (
            "the rounded teacher must differ, but only a little"
        )
    assert results[small]["left"] == 0


def test_the_run_settles_where_the_teacher_lies_and_how_many_a_pass_takes(workspace: Path, tmp_path: Path) -> None:
    place = write_config(workspace, tmp_path, name="place", stop={"steps": 3}, teacher={"shard_within": "auto"})
    auto = write_config(workspace, tmp_path, name="auto", stop={"steps": 3}, teacher={"micro_batches_per_pass": "auto"})
    starts = [(str(config), name, None) for config, name in ((place, "place"), (auto, "auto"))]
    run_ranks("tests.dist.resume_worker:run_all", 2, starts=starts)
    passes, complete = run_dir(str(auto), "auto"), run_dir(str(place), "place")
    assert without_clock(passes) == without_clock(complete)
    noted = [
        (one["shard_within"], one["micro_batches_per_pass"])
        for one in (read_events(passes)[0], read_events(complete)[0])
    ]
    assert noted == [("world", 2), ("gpu", 1)]
