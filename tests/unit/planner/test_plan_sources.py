"""Where a plan's numbers come from: published throughputs, models by their shapes, and a run's length without data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.config import Config, make_config
from ddk_ds.errors import ConfigError
from ddk_ds.planner import plan_inputs
from ddk_ds.planner.known_points import DEEPSPEED, FOUNDRY, FULL, HERE, dense_model, known_points, profiled_model
from ddk_ds.planner.plan_inputs import find_data, find_model


def test_a_dense_model_by_hand() -> None:
    """Each layer has 12 x 256^2 weights; the head is the embedding, and positions are looked up."""
    model = dense_model(3, 256, vocab_size=1000, length=64)
    assert model.shape.parameters == 3 * 12 * 256**2 + 1000 * 256 + 64 * 256
    assert (model.shape.head, model.shape.layers, model.shape.largest_layer) == (256_000, 3, 12 * 256**2)
    assert (model.shape.hidden, model.shape.attention, model.shape.key_value) == (256, 256, 256)
    assert (model.shape.intermediate, model.shape.gated, model.shape.heads) == (1024, False, 2)
    assert model.forward_flops == 2 * (3 * 12 * 256**2 + 256_000) + 4 * 3 * 256 * 64
    assert model.head_flops == 512_000
    # Query, key and value are one tensor.
    assert sorted(model.shape.tensors[2:6]) == sorted((3 * 256**2, 256**2, 4 * 256**2, 4 * 256**2))
    for hidden, heads in ((64, 1), (16_384, 128), (16_512, 129)):
        assert dense_model(1, hidden, vocab_size=10, length=4).shape.heads == heads


def test_the_profiled_models_are_qwens() -> None:
    """Qwen2.5 0.5B and 1.5B have 494,032,768 and 1,543,714,304 parameters; norms and biases are left out."""
    for shape, published in ((FULL.student, 494_032_768), (FULL.teacher, 1_543_714_304)):
        model = profiled_model(shape, FULL.length)
        assert 0.999 < model.shape.parameters / published < 1
        layers = model.shape.parameters - model.shape.head
        assert model.shape.head == 151_936 * shape.hidden_size
        assert model.shape.largest_layer * model.shape.layers == layers
        assert model.forward_flops == 2 * model.shape.parameters + 4 * model.shape.layers * shape.hidden_size * 2048
        size = shape.hidden_size // shape.num_attention_heads
        assert (model.shape.attention, model.shape.key_value) == (shape.hidden_size, 2 * size)
        assert (model.shape.intermediate, model.shape.gated) == (shape.intermediate_size, True)
        assert (model.shape.hidden, model.shape.heads) == (shape.hidden_size, shape.num_attention_heads)


def test_measured_throughputs() -> None:
    points = {(point.name, point.gpus): point for point in known_points()}
    assert len(points) == 27 + 3 + 2
    named = {
        ("MPT 1b, a100-40g, micro-batch 8 x 8", 8): 19271,
        ("MPT 70b, h100-80g, micro-batch 8 x 4, checkpointing", 64): 1039,
    }
    for key, tokens_per_s in named.items():
        assert (points[key].measured, points[key].source) == (tokens_per_s, FOUNDRY)
    # Four passes over 12 L h^2 weights and over the attention's square, three over the vocabulary: 2 FLOPs each.
    for name, gpus, batch, layers, hidden, length, tflop_per_s in (
        ("175b", 256, 32, 96, 12288, 512, 204.49),
        ("1t", 1024, 8, 128, 25600, 1024, 165.36),
        ("2t", 1024, 8, 160, 32768, 1024, 157.0),
    ):
        flops = 4 * 2 * 12 * layers * hidden**2 + 4 * 4 * layers * hidden * length + 3 * 2 * 51200 * hidden
        point = points[f"GPT {name}, a100-80g, micro-batch {batch}, checkpointing", gpus]
        assert point.measured == pytest.approx(tflop_per_s * 1e12 / flops, rel=1e-12) and point.source == DEEPSPEED
    for name, seconds in (("plain torch", 0.19224), ("ZeRO-3 engines", 0.70395)):
        point = points[f"distillation step, {name}, h100-80g", 1]
        assert point.measured == pytest.approx(4 * 2048 / seconds) and point.source == HERE
        assert point.error == pytest.approx((point.simulated - point.measured) / point.measured)


def by_hand(
    layers: int,
    hidden: int,
    vocab: int,
    length: int,
    *,
    nodes: int,
    samples: int,
    micro_batches: int,
    flop_per_s: float,
    hbm: float,
    checkpointing: bool = False,
    host_s: float = 0.0,
) -> float:
    """Return the tokens/s a GPU of A100s, 8 a node, from the page's formulas; learned positions, a tied head.

    Weights are gathered 50 million at a time, and gradients added in bf16. Checkpointing comes with offloading here.
    """
    ranks, tokens, head = 8 * nodes, samples * length, vocab * hidden
    parameters = 12 * hidden**2 * layers + head + length * hidden
    forward = 2 * (12 * hidden**2 * layers + head) + 4 * layers * hidden * length
    bandwidth = 0.8 * (300e9 if nodes == 1 else 8 * 25e9)
    hops = (ranks - nodes) * 3.4e-6 + (nodes * 14e-6 if nodes > 1 else 0)
    latency, waits = 8.4e-6 + hops, 4 * (8.4e-6 + 2 * hops) + host_s

    def sent(elements: float, least_calls: int) -> float:
        calls = max(least_calls, math.ceil(elements / 50_000_000))
        return 2 * elements * (ranks - 1) / ranks / bandwidth + calls * latency

    first = tokens * forward / flop_per_s
    seconds = sent(parameters / layers, 1) + max(first, sent(parameters, layers), layers * host_s)
    second = tokens * (2 * forward + (forward - 2 * head if checkpointing else 0)) / flop_per_s
    reduced = sent(parameters, layers) + (sent(parameters - 5e8, layers) if parameters > 5e8 else 0)
    seconds += max(second, reduced, layers * host_s * (2 if checkpointing else 1)) + tokens * vocab * 9 / (0.8 * hbm)
    update = parameters / ranks * (30 / (0.8 * hbm) + (6 / 25e9 if checkpointing else 0) + 14 / 25e9 / 500)
    return micro_batches * tokens / (micro_batches * seconds + update + waits)


def test_simulated_throughputs() -> None:
    """Of the three sources one each, by hand; the rest differ in their numbers alone."""
    points = {(point.name, point.gpus): point.simulated for point in known_points()}
    one = by_hand(24, 2048, 50368, 2048, nodes=1, samples=8, micro_batches=8, flop_per_s=0.57 * 312e12, hbm=1.555e12)
    assert points["MPT 1b, a100-40g, micro-batch 8 x 8", 8] == pytest.approx(one, rel=1e-9)
    for name, nodes, samples, layers, hidden, length in (
        ("175b", 32, 32, 96, 12288, 512),
        ("1t", 128, 8, 128, 25600, 1024),
        ("2t", 128, 8, 160, 32768, 1024),
    ):
        many = by_hand(
            layers,
            hidden,
            51200,
            length,
            nodes=nodes,
            samples=samples,
            micro_batches=1,
            flop_per_s=0.61 * 312e12,
            hbm=2.039e12,
            checkpointing=True,
            host_s=8.8e-3,
        )
        found = points[f"GPT {name}, a100-80g, micro-batch {samples}, checkpointing", 8 * nodes]
        assert found == pytest.approx(many, rel=1e-9)
    # One H100: nothing is sent. The teacher's pass, the student's forward, its backward of twice as much. Norms, rotary
    # positions and gates move 68 bytes for each of a layer's states, 16 for its queries and keys, 4 for its MLP's.
    tokens, rate, hbm = 4 * 2048, 0.42 * 989e12, 0.8 * 3.35e12
    layers = [(28, 2 * 1536 * (1536 + 256) + 3 * 1536 * 8960, 1536), (24, 2 * 896 * (896 + 128) + 3 * 896 * 4864, 896)]
    flops = [2 * (n * layer + 151_936 * h) + 4 * n * h * 2048 for n, layer, h in layers]
    small = [28 * (68 * 1536 + 16 * (1536 + 256) + 4 * 8960), 24 * (68 * 896 + 16 * (896 + 128) + 4 * 4864)]
    passes = [
        (n, tokens * (times * flops[which] / rate + moved * small[which] / hbm))
        for n, which, times, moved in ((28, 0, 1, 1.0), (24, 1, 1, 1.0), (24, 1, 2, 2.7))
    ]
    parameters = layers[1][0] * layers[1][1] + 151_936 * 896
    rest = tokens * 151_936 * 18 / hbm + parameters * (30 / hbm + 14 / 50e9 / 500)
    for name, host_s in (("plain torch", 0.0), ("ZeRO-3 engines", 8.8e-3)):
        seconds = rest + host_s + sum(max(compute, n * host_s) for n, compute in passes)
        assert points[f"distillation step, {name}, h100-80g", 1] == pytest.approx(tokens / seconds, rel=1e-9)


def config_of(stop: dict[str, Any], **data: Any) -> Config:
    values = {
        "name": "run",
        "student": {"path": "s"},
        "teacher": {"path": "t"},
        "data": {"path": "nowhere", "sequence_length": 128, "validation_samples": 7, **data},
        "mixture": {"interval_steps": 400},
        "optimizer": {"warmup_steps": 0},
        "train": {"global_batch_samples": 64},
        "stop": stop,
    }
    return make_config(values, "test")


@pytest.mark.parametrize(
    ("stop", "steps", "intervals"),
    [
        ({"steps": 800}, 800, 2),
        ({"steps": 801}, 801, 3),
        ({"intervals": 3}, 1200, 3),
        ({"steps": 500, "intervals": 3}, 500, 2),
        ({"steps": 500, "data_once": True}, 500, 2),
    ],
)
def test_a_run_without_data_draws_what_its_steps_take(stop: dict[str, Any], steps: int, intervals: int) -> None:
    found = find_data(config_of(stop, domains=("a", "b")), head_rows=70_000)
    assert (found.steps, found.intervals, found.measurements) == (steps, intervals, intervals + 1)
    assert (found.domains, found.vocab_size, found.token_bytes) == (2, 70_000, 4)
    assert found.shard_bytes == 4 * 128 * (64 * steps + 2 * 7)
    assert found.source.startswith("data.domains; no prepared data in data.path")
    ten = find_data(config_of(stop), head_rows=60_000)
    assert (ten.domains, ten.token_bytes, ten.shard_bytes) == (10, 2, 2 * 128 * (64 * steps + 10 * 7))
    assert ten.source.startswith("assumed: 10 domains, as the paper; no prepared data")


def test_a_run_that_ends_with_its_data_needs_them() -> None:
    with pytest.raises(ConfigError, match="the run ends with its data"):
        find_data(config_of({"data_once": True}), head_rows=60_000)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("no such model\nlook elsewhere\nor there"), "no such model"),
        (ValueError(""), "ValueError"),
        (KeyError("hidden_size"), "'hidden_size'"),
        (TypeError("a list"), "a list"),
        (AttributeError("heads"), "heads"),
        (OSError("no disk"), "cannot be read as JSON: no disk"),
        (json.JSONDecodeError("Expecting value", "x", 0), "cannot be read as JSON: Expecting value"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "cannot be read as JSON: 'utf-8'"),
    ],
)
def test_a_model_that_cannot_be_read_has_one_line(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")

    def fail(path: Path) -> Any:
        raise error

    monkeypatch.setattr(plan_inputs, "configured_files", fail)
    with pytest.raises(ConfigError) as caught:
        find_model(str(tmp_path), "teacher.path", (), 128)
    assert f"config.json {reason}" in str(caught.value) or f"can build: {reason}. It" in str(caught.value)
    assert str(caught.value).startswith("teacher.path: ") and "\n" not in str(caught.value)


def test_a_hub_name_is_looked_for_in_the_models_directories(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"owner/tiny is no directory with a config\.json, and tiny\.json is not in"):
        find_model("owner/tiny", "teacher.path", (tmp_path,), 128)
    values = {"model_type": "llama", "num_attention_heads": 4, "vocab_size": 500, "num_hidden_layers": 2}
    (tmp_path / "tiny.json").write_text(json.dumps({**values, "hidden_size": 64, "intermediate_size": 160}))
    found = find_model("owner/tiny", "teacher.path", (Path("nowhere"), tmp_path), 128)
    assert found.source == str(tmp_path / "tiny.json")
    # Two layers of 4 x 64^2 and 3 x 64 x 160 weights and two norms; an embedding and a head of 500 rows; a norm.
    layer = 4 * 64**2 + 3 * 64 * 160 + 2 * 64
    assert found.shape.parameters == 2 * layer + 2 * 500 * 64 + 64
    assert found.forward_flops == 2 * (2 * layer + 500 * 64 + 64) + 4 * 2 * 64 * 128
