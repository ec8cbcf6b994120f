"""The estimate's parts are close to what torch holds, and the largest micro-batch is the largest that fits.

tests/dist/test_preflight.py compares shards, optimizer states and buffers with DeepSpeed's own on two ranks.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM

from ddk_ds.config import Config, make_config
from ddk_ds.config.sections import Student, Teacher
from ddk_ds.engine import layers
from ddk_ds.engine.attention_masks import use_own_masks
from ddk_ds.engine.layers import checkpoint_layers
from ddk_ds.engine.memory_estimate import _forward_activations as forward_activations
from ddk_ds.engine.memory_estimate import _layer_activations as layer_activations
from ddk_ds.engine.memory_estimate import _passes as passes
from ddk_ds.engine.memory_estimate import _product_bytes, estimate_memory
from ddk_ds.engine.model_files import configured_files, model_shape
from ddk_ds.kernels import Options, chunked, linear_kd_loss
from ddk_ds.kernels.chunked import row_buffer
from ddk_ds.planner.gpu_memory import changed, estimate, placed, plan_memory, with_micro_batch
from ddk_ds.planner.gpus import GPUS, Cluster
from ddk_ds.planner.known_points import dense_model, profiled_model
from ddk_ds.planner.plan_inputs import Models
from tools.bench.step_profile import FULL

ROOT = Path(__file__).parents[3]
LENGTH = 2048


def config_of(**values: Any) -> Config:
    base = {"name": "run", "student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"path": "d"}}
    return make_config({**base, "stop": {"steps": 4000}, **values}, "test")


class OtherMemory(torch.autograd.graph.saved_tensors_hooks):
    """In place of `save_on_cpu`, which copies nothing where the device is a CPU: saved tensors take no memory."""

    def __init__(self, pin_memory: bool) -> None:
        super().__init__(lambda saved: (saved.shape, saved.dtype), lambda kept: torch.empty(kept[0], dtype=kept[1]))


def held(values: dict[str, Any], *, length: int = LENGTH, trains: bool = True, **section: Any) -> int:
    """Return torch's peak in forward and backward of one sample, without parameters and their gradients, in bytes.

    Fake tensors have sizes and no memory. Gradients are dropped as soon as they exist, as ZeRO-3 does. `section` is
    that of the student. Without `trains` it is the peak of a forward pass alone, without gradients.
    """
    use_own_masks()  # sdpa without a mask, as in a run: of 16,384 positions it would keep 0.5 GB in each layer
    with FakeTensorMode():
        config = AutoConfig.for_model(**values)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
        model.train(trains)
        checkpoint_layers(model, Student(path="s", **section))
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda tensor: setattr(tensor, "grad", None))
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker, torch.set_grad_enabled(trains):
            ids = torch.zeros(1, length, dtype=torch.int64)
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            if trains:
                hidden.sum().backward()
    [peak] = tracker.get_tracker_snapshot("peak").values()
    named = {str(getattr(key, "value", key)): value for key, value in peak.items()}
    return named["Total"] - named["Parameter"] - named.get("Gradient", 0)


@pytest.mark.parametrize(("model", "length"), [("Qwen1.5-1.8B", 2048), ("Qwen1.5-1.8B", 16_384), ("Qwen3-4B", 32_768)])
@pytest.mark.parametrize(
    "section",
    [{}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "offload_activations": "cpu"}],
    ids=["kept", "checkpointing", "offload"],
)
def test_activations_are_torchs(
    model: str, length: int, section: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers have their full width; there are only 3 of them and a small vocabulary, to save time."""
    values = json.loads((ROOT / f"configs/models/{model}.json").read_text())
    values |= {"num_hidden_layers": 3, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(values))
    shape = model_shape(configured_files(tmp_path / "config.json"))
    data = {"path": "d", "sequence_length": length}
    config = config_of(method="cpt", teacher=None, student={"path": "s", **section}, data=data)
    monkeypatch.setattr(layers, "save_on_cpu", OtherMemory)
    parts = estimate_memory(config, shape, None, 1000, 1).passes
    assert parts["activations"] + parts["hidden states"] == pytest.approx(
        held(values, length=length, **section), rel=0.11 if "offload_activations" in section else 0.1
    )


@pytest.mark.parametrize("section", [{}, {"gradient_checkpointing": True}], ids=["kept", "checkpointing"])
def test_a_window_has_one_mask_for_all_layers(section: dict[str, Any], tmp_path: Path) -> None:
    """Of joined documents, where other layers need none: 0.5 GB, and 0.3 GB of truth values from which it is made."""
    values = json.loads((ROOT / "configs/models/gemma-3-1b-pt.json").read_text())
    values |= {"num_hidden_layers": 3, "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    values |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    shape = model_shape(configured_files(tmp_path / "config.json"))
    assert shape.window == 512
    data = {"path": "d", "sequence_length": 16_384, "documents": "joined"}
    train = {"micro_batch_samples": 1, "global_batch_samples": 1}
    config = config_of(method="cpt", teacher=None, student={"path": "s", **section}, data=data, train=train)
    parts = estimate_memory(config, shape, None, 1000, 1).passes
    estimated = parts["masks of attention"] + parts["activations"] + parts["hidden states"]
    assert estimated == pytest.approx(held(values, length=16_384, **section), rel=0.1)
    short = changed(config, data={"sequence_length": 512})
    assert "masks of attention" not in estimate_memory(short, shape, None, 1000, 1).passes


@pytest.mark.parametrize(
    ("model", "length"),
    [("Qwen3-32B", 131_072), ("Qwen1.5-14B", 2048), ("starcoder", 2048), ("Qwen3-30B-A3B", 4096)],
)
def test_a_pass_without_gradients_holds_what_torch_holds(model: str, length: int, tmp_path: Path) -> None:
    values = json.loads((ROOT / f"configs/models/{model}.json").read_text())
    values |= {"n_layer" if "n_layer" in values else "num_hidden_layers": 2, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(values))
    shape = model_shape(configured_files(tmp_path / "config.json"))
    measured = held(values, length=length, trains=False)
    assert forward_activations(Teacher(path="t"), shape, length, length, 2) == pytest.approx(measured, rel=0.1)


EXPERTS = {"num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 192}


@pytest.mark.skipif(transformers.__version__ < "5", reason="4.57 loops over experts, and keeps a fifth more")
@pytest.mark.parametrize(("family", "more"), [("qwen3", {}), ("qwen3_moe", EXPERTS), ("olmoe", EXPERTS)])
def test_what_layers_keep_is_torchs(family: str, more: dict[str, int], tmp_path: Path) -> None:
    """The tensors that autograd keeps for the backward pass, each memory once; experts need values to choose."""
    values = {
        "model_type": family,
        "hidden_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "head_dim": 64,
    }
    values |= {
        "num_key_value_heads": 2,
        "intermediate_size": more.get("moe_intermediate_size", 1536),
        "vocab_size": 500,
    }
    (tmp_path / "config.json").write_text(json.dumps(values | more))
    files = configured_files(tmp_path / "config.json")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**files.config), dtype=torch.bfloat16).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.base_model(torch.randint(0, 500, (1, 512)), use_cache=False).last_hidden_state
    held = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    shape = model_shape(files)
    layer = layer_activations(Student(path="s"), shape, 512, 512, 2)
    assert hidden.requires_grad and 3 * layer == pytest.approx(held, rel=0.1)


def test_a_measured_gpu_step() -> None:
    """The parts that a plain step on one device has add up to the peak that CUDA's allocator reported."""
    measured = json.loads((ROOT / "docs/results/gpu_suite_h100.json").read_text())
    peak = measured["parts"]["step_profile"]["result"]["peak_memory_bytes"]
    teacher, student = (profiled_model(shape, FULL.length) for shape in (FULL.teacher, FULL.student))
    train = {"micro_batch_samples": FULL.samples, "global_batch_samples": FULL.samples}
    config = config_of(method="kd", data={"path": "d", "sequence_length": FULL.length}, train=train)
    parts = estimate(config, Models(student, teacher, FULL.student.vocab_size), Cluster(GPUS["h100-80g"], 1, 1)).parts
    weights = ("student shards", "teacher shards", "master weights and moments")
    passes = ("activations", "hidden states", "head's weight gradient", "logits of a chunk", "logits' gradients")
    assert sum(parts[name] for name in (*weights, *passes)) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("logits_dtype", ["float32", "model"])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_heads_buffers(logits_dtype: str, with_teacher: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate of a head's chunk is what it asks for, here on a CPU that multiplies bf16."""
    buffers = []

    def counted(use: str, rows: int, vocab_size: int, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
        buffers.append(row_buffer(use, rows, vocab_size, dtype, like))
        return buffers[-1]

    monkeypatch.setattr(chunked, "row_buffer", counted)
    monkeypatch.setattr(chunked, "has_fast_half", lambda weight: True)
    hidden, weight = torch.zeros(48, 8, dtype=torch.bfloat16), torch.zeros(1000, 8, dtype=torch.bfloat16)
    loss = {"chunk_tokens": 8, "logits_dtype": logits_dtype}
    options = Options(1000, gamma=float(with_teacher), **loss)  # type: ignore[arg-type]
    teacher = (hidden, weight) if with_teacher else (None, None)
    labels, count = torch.zeros(48, dtype=torch.int64), torch.tensor(48)
    linear_kd_loss(hidden, weight.requires_grad_(), *teacher, labels, num_valid=count, options=options)
    train = {"micro_batch_samples": 1, "global_batch_samples": 1}
    method = {"method": "kd"} if with_teacher else {"method": "cpt", "teacher": None}
    config = config_of(**method, loss=loss, data={"path": "d", "sequence_length": 48}, train=train)
    student, frozen = (dense_model(2, 64, vocab_size=1000, length=48).shape for _ in range(2))
    zero = {"max_live_parameters": 0, "prefetch_bucket_size": 0}
    parts = passes(config, student, frozen if with_teacher else None, 1000, zero, "cpu", 1)
    held = sum(buffer.nbytes for buffer in buffers)
    assert parts["logits of a chunk"] + parts["logits' gradients"] == held


@pytest.mark.parametrize(
    ("loss", "logits", "gradients"),
    [
        ({}, 2 * 512 * 4, 2048 * 2),
        ({"chunk_tokens": 2048}, 2 * 2048 * 4, 8192 * 2),
        ({"chunk_tokens": 2048, "logits_dtype": "model"}, 2048 * 2, 8192 * 2),
    ],
)
def test_a_plan_counts_the_chunk_that_is_asked_for(loss: dict[str, Any], logits: int, gradients: int) -> None:
    """Bytes by element of a row, whose width is 151,680 for 151,646 tokens; a micro-batch has 16,384 tokens."""
    models = Models(*(dense_model(2, 64, vocab_size=151_646, length=LENGTH) for _ in range(2)), 151_646)
    config = with_micro_batch(config_of(loss=loss), 8)
    parts = estimate(config, models, CLUSTER).parts
    assert parts["logits of a chunk"] == logits * 151_680
    assert parts["logits' gradients"] == gradients * 151_680


STUDENT, TEACHER = (dense_model(*size, vocab_size=50000, length=LENGTH) for size in ((24, 2048), (40, 5120)))
MODELS = Models(STUDENT, TEACHER, 50000)
CLUSTER = Cluster(GPUS["a100-80g"], 2, 8)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_micro_batch_is_the_last_that_fits(checkpointing: bool) -> None:
    config = changed(config_of(), student={"gradient_checkpointing": checkpointing})
    plan = plan_memory(config, MODELS, CLUSTER)
    assert plan.max_micro_batch > 1
    usable = 0.9 * 80e9
    for samples, fits in ((plan.max_micro_batch, True), (plan.max_micro_batch + 1, False)):
        assert (estimate(with_micro_batch(config, samples), MODELS, CLUSTER).device_bytes <= usable) is fits
    assert 256 // 16 % plan.max_dividing == 0
    assert plan.max_dividing <= plan.max_micro_batch


def test_parts_add_up() -> None:
    plan = plan_memory(config_of(), MODELS, CLUSTER)
    whole = estimate(config_of(), MODELS, CLUSTER)
    assert sum(plan.device_parts.values()) + sum(plan.host_parts.values()) == sum(whole.parts.values())
    parts = {name: plan.device_parts[f"student shards: {name}"] for name in ("parameters", "float32 master", "moments")}
    assert parts["float32 master"] * 2 == pytest.approx(parts["moments"], abs=8)
    assert parts["float32 master"] == pytest.approx(2 * parts["parameters"], abs=8)
    assert plan.host_bytes == 8 * sum(plan.host_parts.values())
    assert plan.activations["with checkpointing"] < plan.activations["without checkpointing"]


def test_nothing_fits() -> None:
    small = Cluster(GPUS["a100-80g"].model_copy(update={"memory_bytes": 4e9}), 1, 1)
    plan = plan_memory(config_of(), MODELS, small)
    assert (plan.fits, plan.max_micro_batch, plan.max_dividing) == (False, 0, 0)


def test_where_the_teacher_lies() -> None:
    """Each node or GPU holds a copy of its weights, and a pass holds the hidden states of all its micro-batches."""

    def parts(**teacher: Any) -> dict[str, int]:
        return plan_memory(changed(config_of(), teacher=teacher), MODELS, CLUSTER).device_parts

    world = parts()
    for within, ranks in (("world", 16), ("node", 8), ("gpu", 1)):
        assert parts(shard_within=within)["teacher shards"] == 2 * TEACHER.shape.shard(ranks)
    more = parts(micro_batches_per_pass=4)["hidden states"] - world["hidden states"]
    assert more == 3 * LENGTH * TEACHER.shape.hidden * 2
    assert "gathered: teacher's layers or head" in world
    resident = parts(shard_within="gpu", micro_batches_per_pass=4)
    assert "gathered: teacher's layers or head" not in resident, "nothing is gathered of a complete teacher"
    assert resident["hidden states"] == parts(micro_batches_per_pass=4)["hidden states"]
    assert resident["activations"] == parts()["activations"], "each of its passes takes one micro-batch"
    # A step has 16 micro-batches of one sample on a rank.
    assert parts(micro_batches_per_pass=16) == parts(micro_batches_per_pass=99)


def test_a_teacher_that_is_converted_when_it_is_complete() -> None:
    """By hand: 40 layers of 12 x 5,120^2 weights and an embedding of 50,000 x 5,120; no student is there yet."""
    teacher = {"shard_within": "gpu", "quantize": "int8"}
    found = estimate(changed(config_of(), teacher=teacher), MODELS, CLUSTER)
    assert found.loading == {"teacher before it has 8 bits": 2 * (TEACHER.shape.parameters + 50_000 * 5120)}
    assert TEACHER.shape.parameters == pytest.approx(40 * 12 * 5120**2 + 50_000 * 5120, rel=0.001)
    libraries = found.resident["CUDA context and NCCL"]
    small = replace(found, passes={}, update={}, resident={"CUDA context and NCCL": libraries})
    assert small.device_bytes == libraries + sum(found.loading.values())
    assert found.device_bytes == sum(found.resident.values()) + sum(found.passes.values()), "training takes more here"
    for other in ({"quantize": "int8"}, {"shard_within": "gpu"}):
        assert not estimate(changed(config_of(), teacher=other), MODELS, CLUSTER).loading


def test_a_cuda_graph_keeps_its_memory() -> None:
    def resident(**teacher: Any) -> dict[str, int]:
        return estimate(changed(config_of(), teacher=teacher), MODELS, CLUSTER).resident

    graph = resident(shard_within="gpu", compile_layers=True).pop("teacher's CUDA graph")
    assert graph > 4 * LENGTH * TEACHER.shape.intermediate, "the gated MLP's two products and more, in bf16"
    for other in ({"shard_within": "node", "compile_layers": True}, {"shard_within": "gpu"}):
        assert "teacher's CUDA graph" not in resident(**other)


@pytest.mark.parametrize(("gpu", "nodes", "place"), [("h200-141g", 2, "gpu"), ("a100-40g", 2, "node")])
def test_auto_takes_the_fastest_place_that_fits(gpu: str, nodes: int, place: str) -> None:
    cluster = Cluster(GPUS[gpu], nodes, 8)
    found = placed(changed(config_of(), teacher={"shard_within": "auto"}), MODELS, cluster)
    assert found.teacher is not None and found.teacher.shard_within == place
    by_hand = changed(config_of(), teacher={"shard_within": "gpu"})
    assert plan_memory(by_hand, MODELS, cluster).fits == (place == "gpu")


def test_experts_in_8_bits(tmp_path: Path) -> None:
    """By hand: of gpt-oss-20b 2 bytes a weight become 1, but not of embedding and head; a layer is held in bf16 too."""
    files = configured_files(ROOT / "configs/models/gpt-oss-20b.json")
    shapes = model_shape(files), model_shape(files)

    def passes(**teacher: Any) -> dict[str, int]:
        config = config_of(teacher={"path": "t", **teacher})
        estimate = estimate_memory(config, *shapes, 1000, 1)
        return {**estimate.passes, "shards": estimate.resident["teacher shards"]}

    plain, int8 = passes(), passes(quantize="int8")
    outside = 2 * 201_088 * 2880 * 2
    assert plain["shards"] == pytest.approx(2 * 20.915e9, rel=0.001)
    assert int8["shards"] == pytest.approx((plain["shards"] - outside) / 2 + outside, rel=0.002)
    experts = 32 * (2880 * 5760 + 2880 * 2880)
    assert int8["teacher's experts out of 8 bits"] == pytest.approx(2 * experts, rel=0.04)
    assert "teacher's experts out of 8 bits" not in plain


def test_a_teacher_in_8_bits() -> None:
    """By hand, Qwen1.5-14B's shape: 2 bytes a weight become 1, but in the two layers that stay, and outside."""
    shape = model_shape(configured_files(ROOT / "configs/models/Qwen1.5-14B.json"))

    def passes(**teacher: Any) -> dict[str, int]:
        config = config_of(teacher={"path": "t", **teacher})
        estimate = estimate_memory(config, shape, shape, 1000, 1)
        return {**estimate.passes, "shards": estimate.resident["teacher shards"]}

    plain, int8, fp8 = passes(), passes(quantize="int8"), passes(quantize="fp8")
    some = passes(quantize="fp8", quantize_skip_layers=(0, -1))
    matrices = 4 * 5120 * 5120 + 3 * 5120 * 13696  # of each of 40 layers
    assert fp8["shards"] == int8["shards"] == plain["shards"] - 40 * matrices
    assert some["shards"] == plain["shards"] - 38 * matrices
    # A layer that is gathered has half of its bytes, unless some layers have all of them.
    assert plain["teacher gathered"] == some["teacher gathered"] > fp8["teacher gathered"]
    # By chance the student's activations are larger than the teacher's, in FP8 too.
    assert fp8["activations"] == plain["activations"]
    # A token's input of 13,696 in float32 and 8 bits; sums of 13,696 in int32 and float32 beside an input of 5,120.
    for kind, num_bytes in (
        ("none", 0),
        ("int8", 0),
        ("fp8", 13696 * (4 + 1)),
        ("int8_dynamic", 5120 + 13696 * (4 + 4)),
    ):
        assert _product_bytes(Teacher(path="t", quantize=kind), shape, "bf16") == num_bytes
