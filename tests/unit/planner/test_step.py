"""The simulated step: its limits by hand, the effect of options, and its distance from measured throughputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from ddk_ds.config import Config, make_config
from ddk_ds.errors import ConfigError
from ddk_ds.planner.gpu_memory import changed
from ddk_ds.planner.gpus import GPUS, Cluster, Gpu
from ddk_ds.planner.known_points import DEEPSPEED, FOUNDRY, HERE, dense_model, known_points
from ddk_ds.planner.plan_inputs import Models, find_model
from ddk_ds.planner.simulations import MOST_GPUS, clusters, simulate_scaling
from ddk_ds.planner.step_time import HOST_S_PER_LAYER, Step, collective_s, simulate_step

A100 = GPUS["a100-80g"]
STUDENT, TEACHER = (dense_model(*size, vocab_size=50000, length=2048) for size in ((24, 2048), (40, 5120)))
MODELS = Models(STUDENT, TEACHER, 50000)


def config_of(**train: Any) -> Config:
    values = {
        "name": "run",
        "student": {"path": "s"},
        "teacher": {"path": "t"},
        "data": {"path": "d"},
        "train": {"micro_batch_samples": 1, **train},
        "stop": {"steps": 4000},
    }
    return make_config(values, "test")


def step_of(config: Config, nodes: int, gpu: Gpu = A100, host_s_per_layer: float = 0.0) -> Step:
    cluster = Cluster(gpu, nodes, 8)
    return simulate_step(
        config, MODELS, cluster, domains=10, storage_bytes_per_s=5e9, host_s_per_layer=host_s_per_layer
    )


def test_a_gather_takes_its_bandwidth() -> None:
    """1 GB within a node over NVLink; between nodes over the 8 adapters of a node, which are slower."""
    within, across = (collective_s(1e9, 0, Cluster(A100, nodes, 8)) for nodes in (1, 4))
    assert within == pytest.approx(1e9 * 7 / 8 / (0.8 * 300e9))
    assert across == pytest.approx(1e9 * 31 / 32 / (0.8 * 8 * 25e9))
    assert collective_s(1e9, 1, Cluster(A100, 1, 1)) == 0.0
    assert collective_s(1e9, 0, Cluster(A100, 4, 8), "node") == within
    assert collective_s(1e9, 5, Cluster(A100, 4, 8), "gpu") == 0.0
    # GPUs alone on their nodes have no NVLink between them.
    assert collective_s(1e9, 0, Cluster(A100, 4, 1)) == pytest.approx(1e9 * 3 / 4 / (0.8 * 25e9))


def test_latency_grows_with_the_ring() -> None:
    one_node, many = (collective_s(0.0, 1, Cluster(A100, nodes, 8)) for nodes in (1, 128))
    assert one_node == pytest.approx(8.4e-6 + 7 * 3.4e-6)
    assert many == pytest.approx(8.4e-6 + 896 * 3.4e-6 + 128 * 14e-6)


def test_without_waiting_the_matmuls_remain() -> None:
    endless = A100.model_copy(update={"nvlink_bytes_per_s": 1e18, "network_bytes_per_s": 1e18, "hbm_bytes_per_s": 1e18})
    step = step_of(config_of(micro_batch_samples=8), 1, endless)
    assert step.parts["teacher: compute"] + step.parts["student: compute"] == pytest.approx(step.seconds, rel=0.01)
    assert step.mfu == pytest.approx(A100.compute_efficiency, rel=0.01)
    assert step.tokens == 256 * 2048


def test_communication_shows_where_it_is_longer_than_computation() -> None:
    slow = A100.model_copy(update={"network_bytes_per_s": 0.5e9})
    fast, waiting = step_of(config_of(), 4), step_of(config_of(), 4, slow)
    name = "teacher: communication not hidden"
    assert waiting.parts["teacher: compute"] == fast.parts["teacher: compute"]
    assert waiting.parts[name] > 10 * fast.parts[name]
    # 8 micro-batches, each with a gather of the whole teacher between nodes: computation hides its own time of it.
    assert MODELS.teacher is not None
    gathered = 8 * 2 * MODELS.teacher.shape.parameters * 31 / 32 / (0.8 * 8 * 0.5e9)
    assert waiting.parts[name] == pytest.approx(gathered - waiting.parts["teacher: compute"], rel=0.1)


def test_where_the_teacher_lies() -> None:
    """Within a node it is gathered over NVLink; on each GPU not at all; several micro-batches share one gather."""
    slow = A100.model_copy(update={"network_bytes_per_s": 0.5e9})
    name = "teacher: communication not hidden"

    def parts(**teacher: Any) -> dict[str, float]:
        return step_of(changed(config_of(), teacher=teacher), 4, slow).parts

    world, node, gpu = (parts(shard_within=within)[name] for within in ("world", "node", "gpu"))
    assert world > node > gpu == 0.0
    together, uneven = (parts(micro_batches_per_pass=count) for count in (4, 3))
    assert together[name] < world / 3
    assert together[name] < uneven[name] < world
    for one in (together, uneven):
        assert one["teacher: compute"] == pytest.approx(parts()["teacher: compute"])


def test_the_hosts_time_shows_at_small_micro_batches() -> None:
    name = "host's hooks not hidden"
    assert step_of(config_of(), 2, host_s_per_layer=HOST_S_PER_LAYER).parts[name] > 0
    assert step_of(config_of(micro_batch_samples=16), 2, host_s_per_layer=HOST_S_PER_LAYER).parts[name] == 0


def test_what_a_configuration_changes() -> None:
    config = config_of(micro_batch_samples=4)
    step = step_of(config, 2)
    again = step_of(changed(config, student={"gradient_checkpointing": True}), 2)
    layers = MODELS.student.forward_flops - MODELS.student.head_flops
    more = again.parts["student: compute"] / step.parts["student: compute"]
    assert more == pytest.approx(1 + layers / (3 * MODELS.student.forward_flops))
    assert again.flops == step.flops
    assert "teacher: compute" not in step_of(changed(config, loss={"gamma": 0.0}), 2).parts
    assert step_of(changed(config, optimizer={"offload": "cpu"}), 2).parts["optimizer"] > step.parts["optimizer"]
    waits = step_of(changed(config, checkpoint={"in_background": False}), 2).parts["checkpoint"]
    assert waits == pytest.approx(14 * MODELS.student.shape.parameters / 5e9 / 500)
    often = step_of(changed(config, mixture={"interval_steps": 100}), 2).parts["controller"]
    assert often == pytest.approx(10 * step.parts["controller"])


def test_the_flops_of_a_step_are_torchs(tmp_path: Path) -> None:
    """Of a step of each kind: torch counts the passes that it really makes, on tensors without memory."""
    shape = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500}
    values = [
        {**shape, "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
        for hidden, layers in ((64, 2), (128, 3))
    ]
    for name, one in zip(("student", "teacher"), values, strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    models = [find_model(str(tmp_path / f"{name}.json"), name, (), 128) for name in ("student", "teacher")]
    train = {"global_batch_samples": 8, "micro_batch_samples": 1, "precision": "fp32"}
    config = changed(config_of(**train), data={"sequence_length": 128})
    for kind, passes in (
        (config, ("student both", "teacher")),
        (changed(config, loss={"gamma": 0.0}), ("student both",)),
        (config.model_copy(update={"method": "ted_filters"}), ("student", "teacher")),
    ):
        step = simulate_step(
            kind,
            Models(*models, 500),
            Cluster(A100, 1, 8),
            domains=0,
            storage_bytes_per_s=5e9,
        )
        counted = sum(torch_flops(values["teacher" in one], 128, backward="both" in one) for one in passes)
        assert step.flops == pytest.approx(8 * counted, rel=0.02), passes
        assert ("optimizer" in step.parts and step.parts["optimizer"] > 0) == ("student both" in passes)


def torch_flops(values: dict[str, Any], length: int, *, backward: bool) -> int:
    """Return torch's count for one sample: a forward pass, and its backward pass if asked for."""
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), attn_implementation="eager")
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            logits = model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False).logits
            if backward:
                logits.sum().backward()
    return int(counter.get_total_flops())


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="global_batch_samples 256 is not a multiple"):
        step_of(config_of(micro_batch_samples=3), 1)


def test_scaling_reaches_from_2_to_1024() -> None:
    cluster = Cluster(A100, 2, 8)
    assert [at.ranks for at in clusters(cluster)] == [2**n for n in range(1, 11)]
    assert [at.ranks for at in clusters(Cluster(A100, 1, 6))][:5] == [2, 4, 6, 12, 24]
    assert [at.ranks for at in clusters(Cluster(A100, 4, 1))][:3] == [2, 4, 8]
    strong, larger, weak = simulate_scaling(config_of(), MODELS, cluster, domains=10, storage_bytes_per_s=5e9)
    assert [point.gpus for point in strong.points][-1] == 256  # one sample a GPU
    assert [point.gpus for point in larger.points][-1] == MOST_GPUS
    assert {point.global_batch_samples // point.gpus for point in weak.points} == {16}
    for curve in (strong, larger, weak):
        of_a_gpu = [point.tokens_per_s / point.gpus for point in curve.points]
        assert of_a_gpu[-1] < of_a_gpu[2]


# docs/planning.md explains the larger errors. These bounds are what is reached today: an error that grows fails.
def test_known_points() -> None:
    points = known_points()
    within = {
        FOUNDRY: lambda name: 0.30 if "checkpointing" in name else 0.11,
        DEEPSPEED: lambda name: 0.20,
        HERE: lambda name: 0.35 if "plain" in name else 0.05,
    }
    assert {point.source for point in points} == set(within)
    assert max(point.gpus for point in points) == 1024
    for point in points:
        assert abs(point.error) <= within[point.source](point.name), point
