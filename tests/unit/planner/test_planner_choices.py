"""What a plan chooses, where memory follows a rule that can be computed by hand: advice, micro-batches, batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.config import Config, make_config
from ddk_ds.engine.memory_estimate import MemoryEstimate
from ddk_ds.engine.model_files import Matrix
from ddk_ds.errors import ConfigError
from ddk_ds.planner import advice, gpu_memory, simulations
from ddk_ds.planner.faster import faster_steps
from ddk_ds.planner.gpu_memory import MemoryPlan, plan_memory
from ddk_ds.planner.gpus import GPUS, Cluster, find_gpu
from ddk_ds.planner.known_points import dense_model
from ddk_ds.planner.plan_inputs import Models
from ddk_ds.planner.simulations import LayoutPoint, advised, forms_of, layouts_on, simulate_layouts, simulate_scaling
from ddk_ds.planner.step_time import simulate_step

STUDENT, TEACHER = (dense_model(*size, vocab_size=1000, length=64) for size in ((2, 128), (4, 256)))
MODELS = Models(STUDENT, TEACHER, 1000)
CLUSTER = Cluster(GPUS["a100-80g"], nodes=1, gpus_per_node=2)


def config_of(global_batch: int = 64, micro_batch: int = 8, **sections: Any) -> Config:
    values = {
        "name": "run",
        "student": {"path": "s", "gradient_checkpointing": False},
        "teacher": {"path": "t"},
        "data": {"path": "d", "sequence_length": 64},
        "train": {"global_batch_samples": global_batch, "micro_batch_samples": micro_batch},
        "stop": {"steps": 4000},
    }
    return make_config({**values, **sections}, "test")


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Memory by a rule: 100, 80 or 50 a sample by the checkpointing; optimizer 400, teacher 200; all over the nodes."""
    limit = {"bytes": 0.0}

    def rule(config: Config, models: Models, cluster: Cluster) -> MemoryPlan:
        assert models is MODELS and config.teacher is not None
        a_sample = {False: 100, "selective": 80, True: 50}[config.student.gradient_checkpointing]
        states = 400 * (config.optimizer.offload == "none") + 200 * (config.teacher.offload_params == "none")
        per_rank = config.train.global_batch_samples // cluster.ranks
        fitting = [n for n in range(1, 99) if (n * a_sample + states) / cluster.nodes <= limit["bytes"]]
        device_bytes = int((config.train.micro_batch_samples * a_sample + states) / cluster.nodes)
        return MemoryPlan(
            device_parts={},
            host_parts={},
            device_bytes=device_bytes,
            host_bytes=7 * cluster.nodes,
            usable_bytes=int(limit["bytes"]),
            fits=device_bytes <= limit["bytes"],
            activations={},
            max_micro_batch=max(fitting, default=0),
            max_dividing=max((n for n in fitting if per_rank % n == 0), default=0),
        )

    monkeypatch.setattr(advice, "plan_memory", rule)
    yield limit


def advice_of(config: Config, cluster: Cluster = CLUSTER) -> list[tuple[str, int, bool]]:
    found = advice.advise(config, MODELS, cluster)
    assert all(one.host_bytes == 7 * one.nodes for one in found)
    return [(one.change, one.device_bytes, one.fits) for one in found]


SELECTIVE, ALL = "student.gradient_checkpointing=selective", "student.gradient_checkpointing=true"
INPUTS = f"{ALL} student.offload_activations=cpu"  # offered if not even one sample fits
OFFLOAD, PARAMS = "optimizer.offload=cpu", "teacher.offload_params=cpu"


def test_one_change_is_enough(usable: dict[str, float]) -> None:
    """8 samples and all states are 1,400."""
    usable["bytes"] = 1000
    assert advice_of(config_of()) == [
        (SELECTIVE, 1240, False),
        (ALL, 1000, True),
        ("train.micro_batch_samples=4", 1000, True),
        (OFFLOAD, 1000, True),
        (PARAMS, 1200, False),
        ("--nodes 2", 700, True),
    ]
    usable["bytes"] = 1300
    changes = [change for change, _, _ in advice_of(config_of())]
    assert changes[2] == "train.micro_batch_samples=4"  # 7 fit, of which 4 divides the 32 of a rank
    # What is there already is not offered.
    config = config_of(student={"path": "s", "gradient_checkpointing": True}, optimizer={"offload": "cpu"})
    usable["bytes"] = 500
    assert [change for change, _, _ in advice_of(config)] == ["train.micro_batch_samples=4", PARAMS, "--nodes 2"]
    config = config_of(student={"path": "s", "gradient_checkpointing": "selective"})
    usable["bytes"] = 1000
    assert advice_of(config)[0][0] == ALL
    # A teacher that is complete on each GPU cannot be offloaded.
    changes = [change for change, _, _ in advice_of(config_of(teacher={"path": "t", "shard_within": "gpu"}))]
    assert changes[0] == "teacher.shard_within=node"
    assert changes[-2] == f"teacher.shard_within=node {PARAMS}"


def test_changes_together_and_the_largest_micro_batch_with_them(usable: dict[str, float]) -> None:
    usable["bytes"] = 320
    found = advice_of(config_of())
    assert found == [
        (SELECTIVE, 1240, False),
        (ALL, 1000, False),
        (OFFLOAD, 1000, False),
        (INPUTS, 1000, False),
        (PARAMS, 1200, False),
        (ALL, 1000, False),
        (f"{ALL} train.micro_batch_samples=1", 650, False),
        (f"{ALL} train.micro_batch_samples=2 {OFFLOAD}", 300, True),
        ("--nodes 8 train.micro_batch_samples=4", 125, True),  # 4 nodes hold 350; a rank of 8 has 4 samples
    ]
    prices = [one.price for one in advice.advise(config_of(), MODELS, CLUSTER)]
    assert prices[7] == "; ".join(
        (prices[0], prices[1], "the same gathers and work of the host for fewer tokens", prices[2])
    )
    assert prices[8] == "more GPUs, each with less to compute; the same gathers and work of the host for fewer tokens"
    # A micro-batch of one sample cannot shrink; one that leaves room is not made larger than it was.
    usable["bytes"] = 60
    assert not any("micro_batch" in change for change, _, _ in advice_of(config_of(micro_batch=1)))
    usable["bytes"] = 500  # for 6 of 24 samples
    assert advice_of(config_of(48, 4))[-2] == (f"{ALL} train.micro_batch_samples=4 {OFFLOAD}", 400, True)


def test_nothing_is_enough(usable: dict[str, float]) -> None:
    usable["bytes"] = -1
    together = f"{INPUTS} train.micro_batch_samples=1 {OFFLOAD} {PARAMS}"
    found = advice_of(config_of())
    # 64 samples are enough for 32 nodes of 2 GPUs; 128 nodes are the most.
    assert found[-3:] == [
        (together, 50, False),
        ("--nodes 32 train.micro_batch_samples=1", 21, False),
        (f"--nodes 32 {together}", 1, False),
    ]
    assert (
        advice_of(config_of(global_batch=48, micro_batch=4))[-1][0] == f"--nodes 8 {together}"
    )  # 48 / 32 is no number
    assert advice_of(config_of(global_batch=4096))[-1][0] == f"--nodes 128 {together}"
    assert advice_of(config_of(global_batch=4096), replace(CLUSTER, nodes=64))[-1][0] == f"--nodes 128 {together}"
    assert not any("--nodes" in change for change, _, _ in advice_of(config_of(4096), replace(CLUSTER, nodes=128)))
    # A batch that the ranks cannot share as it is.
    assert not any("micro_batch" in change for change, _, _ in advice_of(config_of(63, 3)))


def test_the_largest_number_that_fits() -> None:
    for most in range(70):
        assert gpu_memory._largest(most.__ge__) == most
    assert gpu_memory._largest((4097).__ge__) == 4097
    assert gpu_memory._largest(lambda n: True) == 2**16 - 1


def test_memory_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations of 10 GB a sample, half with checkpointing and 8 with "selective"; 10 GB are held always."""

    def rule(config: Config, *shapes: Any, ranks_per_node: int) -> MemoryEstimate:
        assert shapes[2:] == (1000, 4) and ranks_per_node == 2
        a_sample = {False: 10, "selective": 8, True: 5}[config.student.gradient_checkpointing] * 10**9
        return MemoryEstimate(
            resident={"master weights and moments": 6 * 10**9, "student shards": 4 * 10**9, "empty": 0},
            passes={"activations": config.train.micro_batch_samples * a_sample},
            update={"logits of a chunk": 3},
            host={"checkpoint's copy": 11, "else": 5},
        )

    monkeypatch.setattr(gpu_memory, "estimate_memory", rule)
    cluster = replace(CLUSTER, nodes=2)
    plan = plan_memory(config_of(global_batch=48, micro_batch=6), MODELS, cluster)
    assert plan.device_parts == {
        "student shards: float32 master": 2 * 10**9,
        "student shards: moments": 4 * 10**9,
        "student shards: parameters": 4 * 10**9,
        "activations": 60 * 10**9,
        "logits chunk: logits of both models": 3,
    }
    assert plan.host_parts == {"checkpoint copy on the host": 11, "else": 5}
    assert (plan.device_bytes, plan.host_bytes, plan.usable_bytes) == (70 * 10**9, 32, 72 * 10**9)
    assert plan.activations == {
        "with checkpointing": 30 * 10**9,
        "with selective checkpointing": 48 * 10**9,
        "without checkpointing": 60 * 10**9,
    }
    assert plan.fits and (plan.max_micro_batch, plan.max_dividing) == (6, 6)  # 12 samples a rank
    for global_batch, dividing in ((40, 5), (16, 4), (8, 2), (28, 1), (42, 0)):
        assert plan_memory(config_of(global_batch, 1), MODELS, cluster).max_dividing == dividing, global_batch
    assert not plan_memory(config_of(global_batch=56, micro_batch=7), MODELS, cluster).fits


def test_a_gpus_name_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there are two of them: a100-40g or a100-80g"):
        find_gpu("a100")
    figures = "peak_flop_per_s: 1e12\nmemory_bytes: 1e9\nhbm_bytes_per_s: 1e9\nnvlink_bytes_per_s: 1e9\n"
    Path("a100").write_text(f"name: mine\n{figures}network_bytes_per_s: 2e9\n")
    mine = find_gpu("a100")
    assert (mine.name, mine.peak_flop_per_s, mine.network_bytes_per_s) == ("mine", 1e12, 2e9)
    assert (mine.host_bytes_per_s, mine.compute_efficiency, mine.source) == (25e9, 0.4, "given by the user")
    for value in ("true", "[1]", "null"):
        Path("wrong").write_text(f"name: mine\n{figures}network_bytes_per_s: {value}\n")
        with pytest.raises(ConfigError, match="network_bytes_per_s: input should be"):
            find_gpu("wrong")
    with pytest.raises(ConfigError, match="neither one of"):
        find_gpu("")
    Path("wrong").write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match="cannot be read as YAML: 'utf-8' codec"):
        find_gpu("wrong")

    def denied(self: Path, encoding: str) -> str:
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ConfigError, match="cannot be read as YAML: not yours"):
        find_gpu("wrong")


def test_the_data_sheets_of_the_gpus() -> None:
    """Peak in TFLOP/s, GB, then GB/s of memory, NVLink, network and host, and the share that matmuls reach."""
    sheets = {
        "a100-40g": (312, 40, 1555, 300, 25, 25, 0.57),
        "a100-80g": (312, 80, 2039, 300, 25, 25, 0.61),
        "h100-80g": (989, 80, 3350, 450, 50, 50, 0.42),
        "h200-141g": (989, 141, 4800, 450, 50, 50, 0.42),
    }
    for name, (peak, memory, *speeds, efficiency) in sheets.items():
        gpu = GPUS[name]
        assert (gpu.peak_flop_per_s, gpu.memory_bytes, gpu.compute_efficiency) == (
            peak * 1e12,
            memory * 1e9,
            efficiency,
        )
        found = (gpu.hbm_bytes_per_s, gpu.nvlink_bytes_per_s, gpu.network_bytes_per_s, gpu.host_bytes_per_s)
        assert found == tuple(speed * 1e9 for speed in speeds)
        assert gpu.fp8_peak_flop_per_s == (None if name.startswith("a100") else 1979e12)
        assert gpu.int8_peak_flop_per_s == (624e12 if name.startswith("a100") else 1979e12)
        assert gpu.source.startswith(f"NVIDIA's data sheets of {gpu.name.split()[0]} SXM (peak, memory, NVLink)")
    assert set(GPUS) == set(sheets)


def test_batches_of_a_scaling() -> None:
    """From 48 samples and micro-batches of 6: 1, 2, 4, 8 nodes of 2 GPUs; then a GPU has fewer than 6."""
    strong, larger, weak = simulate_scaling(
        config_of(global_batch=48, micro_batch=6), MODELS, replace(CLUSTER, nodes=2), domains=2, storage_bytes_per_s=1e9
    )
    assert (strong.name, larger.name) == ("strong, 48 samples a step", "strong, 1,536 samples a step")
    assert weak.name == "weak, 12 samples a GPU and step"
    assert [(one.gpus, one.micro_batch_samples) for one in strong.points] == [(2, 6), (4, 6), (8, 6), (16, 3)]
    assert {one.global_batch_samples for one in strong.points} == {48}
    assert [one.gpus for one in larger.points] == [2**n for n in range(1, 10)]
    assert [one.micro_batch_samples for one in larger.points] == [6] * 8 + [3]  # 1,536 on 512 GPUs
    assert [one.global_batch_samples for one in weak.points] == [12 * 2**n for n in range(1, 11)]
    assert {one.micro_batch_samples for one in weak.points} == {6}
    for curve in (strong, larger, weak):
        for one in curve.points:
            assert one.tokens_per_s == pytest.approx(one.global_batch_samples * 64 / one.step_s)
            assert one.fits
    # A batch that reaches all GPUs needs no larger one; fewer samples than GPUs are one each.
    both = simulate_scaling(config_of(1024, 1), MODELS, replace(CLUSTER, nodes=1), domains=2, storage_bytes_per_s=1e9)
    assert [curve.name for curve in both] == ["strong, 1,024 samples a step", "weak, 512 samples a GPU and step"]
    # 4 do not divide the 6 samples of a rank, 3 do.
    odd = simulate_scaling(config_of(12, 4), MODELS, replace(CLUSTER, nodes=1), domains=2, storage_bytes_per_s=1e9)
    assert odd[0].points[0].micro_batch_samples == 3
    few = simulate_scaling(config_of(2, 1), MODELS, replace(CLUSTER, nodes=4), domains=2, storage_bytes_per_s=1e9)
    assert few[-1].name == "weak, 1 samples a GPU and step"


def test_sizes_of_clusters() -> None:
    def sizes(gpus_per_node: int) -> list[tuple[int, int]]:
        return [
            (at.nodes, at.gpus_per_node)
            for at in simulations.clusters(replace(CLUSTER, nodes=3, gpus_per_node=gpus_per_node))
        ]

    assert sizes(8) == [(1, 2), (1, 4), *((2**n, 8) for n in range(8))]
    assert sizes(3) == [(1, 2), *((2**n, 3) for n in range(9))]
    assert sizes(1) == [(2**n, 1) for n in range(1, 11)]


def test_layouts_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass takes as many micro-batches as fit: 3 of a rank's here, and all of them are in fewer passes."""

    def of_passes(config: Config, models: Models, cluster: Cluster) -> MemoryEstimate:
        assert config.teacher is not None
        return MemoryEstimate({"a pass": config.teacher.pass_size}, {}, {}, {})

    for module in (simulations, gpu_memory):
        monkeypatch.setattr(module, "estimate", of_passes)
    monkeypatch.setattr(gpu_memory, "_usable_bytes", lambda cluster: 3)
    points = simulate_layouts(config_of(32, 2), MODELS, CLUSTER, domains=2, storage_bytes_per_s=1e9)
    assert len(points) == 3 * 10 * 5  # networks, numbers of nodes from 1 to 512, layouts
    assert [one.link_bytes_per_s for one in points[::50]] == [3e9, 25e9, 100e9]
    assert [one.gpus for one in points[:50:5]] == [2**n for n in range(1, 11)]
    names = ["world", "world, n a pass", "node", "node, n a pass", "gpu"]
    assert [one.name for one in points[:5]] == names
    # 1,024 samples: 512 micro-batches of 2, over n GPUs; 171 passes of 3; 1,024 GPUs have one sample each.
    sizes = [one.micro_batches_per_pass for one in points[1:50:5]]
    assert sizes == [3, 3, 3, 3, 3, 3, 2, 2, 1, 1]
    assert {one.micro_batches_per_pass for one in points if not one.several} == {1}
    assert all(one.fits and one.device_bytes == one.micro_batches_per_pass for one in points)
    offloaded = config_of(32, 2, teacher={"path": "t", "offload_params": "cpu"})
    points = simulate_layouts(offloaded, MODELS, CLUSTER, domains=2, storage_bytes_per_s=1e9)
    assert [one.name for one in points[:4]] == names[:4] and len(points) == 3 * 10 * 4, (
        "a complete one is not offloaded"
    )


def test_equal_layouts_are_within_a_hundredth() -> None:
    def point(speed: float, device_bytes: int) -> LayoutPoint:
        return LayoutPoint(3e9, 8, "none", "node", 1, speed, device_bytes, True, False)

    fast, equal, slower = point(1000.0, 30), point(990.0, 20), point(989.9, 10)
    assert advised([fast, equal, slower]) == equal
    assert advised([fast, slower]) == fast
    assert advised([]) is None


def with_matrices(*shapes: tuple[int, ...]) -> Models:
    """Return models whose teacher has these matrices; those of three axes are experts'."""
    matrices = tuple(Matrix(0, shape, expert=len(shape) == 3) for shape in shapes)
    return replace(MODELS, teacher=replace(TEACHER, shape=replace(TEACHER.shape, matrices=matrices)))


def test_8_bits_that_a_run_would_accept() -> None:
    """FP8 needs a GPU that has it, bf16, and half of the matrices with sides of 16; int8_dynamic sides of 8."""
    a100, h100 = GPUS["a100-80g"], GPUS["h100-80g"]
    config, models = config_of(), with_matrices((64, 32), (16, 16))
    assert forms_of(config, models, a100) == ["none", "int8", "int8_dynamic"]
    assert forms_of(config, models, h100) == ["none", "int8", "int8_dynamic", "fp8"]
    fp32 = config_of(train={"global_batch_samples": 64, "micro_batch_samples": 8, "precision": "fp32"})
    assert forms_of(fp32, models, h100) == ["none", "int8", "int8_dynamic"]
    assert forms_of(config, with_matrices((64, 32), (72, 64)), h100) == ["none", "int8", "int8_dynamic"]
    assert forms_of(config, with_matrices((64, 32), (72, 24)), h100) == ["none", "int8", "int8_dynamic", "fp8"]
    assert forms_of(config, with_matrices((64, 33)), h100) == ["none"] == forms_of(config, MODELS, h100)
    skipping = config_of(teacher={"path": "t", "quantize": "int8", "quantize_skip_layers": [0]})
    assert forms_of(skipping, models, a100) == ["none", "int8", "int8_dynamic"]


def test_layouts_have_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulations, "MOST_GPUS", 2)
    monkeypatch.setattr(simulations, "LINKS_BYTES_PER_S", (3e9,))
    models, cluster = with_matrices((256, 1024), (1024, 256)), replace(CLUSTER, gpu=GPUS["h100-80g"])
    points = simulate_layouts(config_of(), models, cluster, domains=2, storage_bytes_per_s=1e9)
    assert [(one.quantize, one.name) for one in points[::5]] == [
        (form, "world") for form in ("none", "int8", "int8_dynamic", "fp8")
    ]
    assert len(points) == 4 * 5


def test_faster_steps_are_those_of_their_options() -> None:
    """Each row is the step that its words give, at the place that is advised for it; `times` is over the step now."""
    models = with_matrices((256, 1024), (1024, 256))
    cluster = replace(CLUSTER, gpu=GPUS["h100-80g"])
    options: Any = {"domains": 2, "storage_bytes_per_s": 1e9}
    now = simulate_step(config_of(), models, cluster, **options)
    found = faster_steps(config_of(), models, cluster, now, **options)
    assert [one.numbers for one in found] == ["rounded otherwise", *["another teacher"] * 3]
    for one in found:
        words = dict(word.split("=") for word in one.change.split())
        assert words.pop("student.compile_layers") == words.pop("teacher.compile_layers") == "true"
        section = {
            "path": "t",
            "compile_layers": True,
            **{key.partition(".")[2]: value for key, value in words.items()},
        }
        section["micro_batches_per_pass"] = int(section.get("micro_batches_per_pass", 1))
        student = {"path": "s", "gradient_checkpointing": False, "compile_layers": True}
        step = simulate_step(config_of(student=student, teacher=section), models, cluster, **options)
        assert one.step_s == pytest.approx(step.seconds) and one.tokens_per_s == pytest.approx(step.tokens_per_s)
        assert one.times == pytest.approx(now.seconds / step.seconds)
        advice = advised(
            layouts_on(
                config_of(student=student, teacher=section),
                models,
                cluster,
                **options,
                forms=[section.get("quantize", "none")],
            )
        )
        assert advice is not None and advice.shard_within == section["shard_within"]
    assert len({one.change for one in found}) == 4
    shared = {"global_batch_samples": 64, "micro_batch_samples": 8, "sequence_parallel": 2}
    assert faster_steps(config_of(train=shared), models, cluster, now, **options) == []
    without = config_of(teacher=None, method="cpt", mixture={"controller": "equal"})
    assert faster_steps(without, models, cluster, now, **options) == []
