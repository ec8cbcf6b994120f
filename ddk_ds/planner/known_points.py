"""Throughputs that were measured, most of them by others, and what the simulated step gives for the same runs.

ddk plan --known-points
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ddk_ds.config import Config, make_config
from ddk_ds.engine.flops import forward_flops
from ddk_ds.engine.model_files import ModelShape
from ddk_ds.planner.gpus import GPUS, Cluster
from ddk_ds.planner.plan_inputs import Models, PlannedModel
from ddk_ds.planner.step_time import HOST_S_PER_LAYER, simulate_step

_PREFETCH = 50_000_000
"""Elements gathered ahead: DeepSpeed's default, with which these runs were measured."""
_GPUS_PER_NODE = 8
_MPT = {
    "1b": (24, 2048),
    "3b": (32, 2560),
    "7b": (32, 4096),
    "13b": (40, 5120),
    "30b": (48, 7168),
    "70b": (80, 8192),
}
"""MPT's models: layers, width. A tied head of 50,368 rows, 2,048 learned positions, an MLP of 4 x width."""
_MEGATRON = {"175b": (96, 12288), "1t": (128, 25600), "2t": (160, 32768)}
"""Models of the DeepSpeed team's runs: layers, width; Megatron's vocabulary of 51,200."""

FOUNDRY = (
    "llm-foundry, scripts/train/benchmarking/README.md (FSDP FULL_SHARD, bf16, MPT models, 2,048 tokens a sample; A100 "
    "with 1,600 Gb/s a node)"
)
DEEPSPEED = (
    "DeepSpeed blog, 2022-07-26, 'Azure empowers easy-to-use, high-performance, and hyperscale model training using "
    "DeepSpeed' (ZeRO-3, optimizer and activations offloaded, A100 80 GB with 8 x 200 Gb/s a node)"
)
HERE = "docs/results/gpu_suite_h100.json (Qwen2.5 1.5 B to 0.5 B, 8,192 tokens, transformers' own layers)"


@dataclass(frozen=True)
class Shape:
    """The part of a Hugging Face configuration that time and FLOPs depend on; the head is the embedding."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool = True


@dataclass(frozen=True)
class Setting:
    """Two models and the tokens of a step, samples x length, that are timed."""

    teacher: Shape
    student: Shape
    samples: int
    length: int
    steps: int
    warm_up_steps: int = 2


FULL = Setting(
    Shape("qwen2", 1536, 28, 12, 2, 8960, 151936), Shape("qwen2", 896, 24, 14, 2, 4864, 151936), 4, 2048, steps=6
)


class Published(NamedTuple):
    """One row of llm-foundry's table of throughputs."""

    gpu: str
    model: str
    gpus: int
    micro_batch: int
    micro_batches: int
    checkpointing: bool
    tokens_per_s_per_gpu: float


# One node, of which the compute efficiencies in gpus.py are the medians, and many nodes, which are predicted.
FOUNDRY_ROWS = (
    Published("a100-40g", "1b", 8, 8, 8, False, 19271),
    Published("a100-40g", "3b", 8, 5, 8, False, 10065),
    Published("a100-40g", "7b", 8, 12, 4, True, 3679),
    Published("a100-40g", "1b", 128, 10, 1, False, 18647),
    Published("a100-40g", "3b", 64, 6, 1, False, 9736),
    Published("a100-40g", "3b", 128, 6, 1, False, 9538),
    Published("a100-40g", "7b", 16, 16, 1, True, 3645),
    Published("a100-40g", "7b", 128, 18, 1, True, 3623),
    Published("a100-40g", "13b", 16, 10, 1, True, 1993),
    Published("a100-40g", "13b", 128, 16, 1, True, 1972),
    Published("a100-40g", "30b", 128, 6, 1, True, 865),
    Published("a100-40g", "70b", 64, 2, 1, True, 276),
    Published("a100-40g", "70b", 128, 4, 1, True, 376),
    Published("a100-80g", "1b", 8, 14, 4, False, 20513),
    Published("a100-80g", "3b", 8, 10, 2, False, 10811),
    Published("a100-80g", "7b", 8, 6, 2, False, 4641),
    Published("a100-80g", "13b", 8, 2, 3, False, 2262),
    Published("a100-80g", "70b", 32, 2, 16, True, 373),
    Published("a100-80g", "70b", 64, 8, 4, True, 410),
    Published("h100-80g", "1b", 8, 14, 1, False, 45455),
    Published("h100-80g", "7b", 8, 6, 1, False, 10643),
    Published("h100-80g", "13b", 8, 2, 1, False, 4792),
    Published("h100-80g", "1b", 64, 20, 1, False, 44402),
    Published("h100-80g", "3b", 64, 6, 3, False, 22525),
    Published("h100-80g", "13b", 64, 2, 1, False, 4800),
    Published("h100-80g", "30b", 32, 14, 3, True, 2308),
    Published("h100-80g", "70b", 64, 8, 4, True, 1039),
)


@dataclass(frozen=True)
class Point:
    """One measured throughput and the simulated one, in tokens/s a GPU."""

    name: str
    gpus: int
    measured: float
    simulated: float
    source: str

    @property
    def error(self) -> float:
        """Return simulated / measured - 1, which is positive if the simulation is too fast."""
        return self.simulated / self.measured - 1


def known_points() -> list[Point]:
    """Simulate every run whose throughput was measured or published."""
    return [*map(_foundry, FOUNDRY_ROWS), *_deepspeed(), *_here()]


def _foundry(row: Published) -> Point:
    layers, hidden = _MPT[row.model]
    model = dense_model(layers, hidden, vocab_size=50368, length=2048)
    config = _config(
        length=2048,
        micro_batch=row.micro_batch,
        global_batch=row.micro_batch * row.micro_batches * row.gpus,
        checkpointing=row.checkpointing,
    )
    # FSDP has only one hook for each block.
    simulated = _tokens_per_s_per_gpu(config, Models(model, None, 50368), row.gpu, row.gpus, 0.0)
    name = f"MPT {row.model}, {row.gpu}, micro-batch {row.micro_batch} x {row.micro_batches}"
    if row.checkpointing:
        name += ", checkpointing"
    return Point(name, row.gpus, row.tokens_per_s_per_gpu, simulated, FOUNDRY)


def _deepspeed() -> list[Point]:
    points = []
    for model_name, gpus, micro_batch, length, flop_per_s in (
        ("175b", 256, 32, 512, 204.49e12),
        ("1t", 1024, 8, 1024, 165.36e12),
        ("2t", 1024, 8, 1024, 157e12),
    ):
        layers, hidden = _MEGATRON[model_name]
        # Their FLOPs of a token: four forward passes, since they count the recomputed one.
        flops = 96 * layers * hidden**2 * (1 + length / (6 * hidden) + 51200 / (16 * layers * hidden))
        model = dense_model(layers, hidden, vocab_size=51200, length=length)
        config = _config(
            length=length, micro_batch=micro_batch, global_batch=micro_batch * gpus, checkpointing=True, offload="cpu"
        )
        simulated = _tokens_per_s_per_gpu(config, Models(model, None, 51200), "a100-80g", gpus, HOST_S_PER_LAYER)
        name = f"GPT {model_name}, a100-80g, micro-batch {micro_batch}, checkpointing"
        points.append(Point(name, gpus, flop_per_s / flops, simulated, DEEPSPEED))
    return points


def _here() -> list[Point]:
    tokens = FULL.samples * FULL.length
    teacher, student = (profiled_model(shape, FULL.length) for shape in (FULL.teacher, FULL.student))
    models, gpu = Models(student, teacher, FULL.student.vocab_size), "h100-80g"
    config = _config(
        length=FULL.length, micro_batch=FULL.samples, global_batch=FULL.samples, checkpointing=False, method="kd"
    )
    return [
        Point(f"{name}, {gpu}", 1, tokens / seconds, _tokens_per_s_per_gpu(config, models, gpu, 1, host_s), HERE)
        for name, seconds, host_s in (
            ("distillation step, plain torch", 0.19224, 0.0),
            ("distillation step, ZeRO-3 engines", 0.70395, HOST_S_PER_LAYER),
        )
    ]


def _tokens_per_s_per_gpu(config: Config, models: Models, gpu: str, gpus: int, host_s: float) -> float:
    per_node = min(gpus, _GPUS_PER_NODE)
    cluster = Cluster(GPUS[gpu], gpus // per_node, per_node)
    step = simulate_step(config, models, cluster, domains=0, storage_bytes_per_s=1e9, host_s_per_layer=host_s)
    return step.tokens_per_s / gpus


def _config(
    *, length: int, micro_batch: int, global_batch: int, checkpointing: bool, method: str = "cpt", offload: str = "none"
) -> Config:
    values = {
        "name": "known-point",
        "method": method,
        "student": {"path": "-", "gradient_checkpointing": checkpointing, "whole_layers": False},
        "teacher": None if method == "cpt" else {"path": "-", "whole_layers": False},
        "data": {"path": "-", "sequence_length": length},
        "optimizer": {"offload": offload},
        # Both add gradients over ranks in bf16 by default.
        "train": {"global_batch_samples": global_batch, "micro_batch_samples": micro_batch, "reduce_dtype": "bfloat16"},
        "stop": {"steps": 10_000},
        "deepspeed": {"zero_optimization": {"stage3_prefetch_bucket_size": _PREFETCH}},
    }
    return make_config(values, "known point")


def dense_model(layers: int, hidden: int, *, vocab_size: int, length: int) -> PlannedModel:
    """Describe a GPT with 12 `hidden`^2 weights in each layer, a tied head, and `length` learned positions."""
    layer = (3 * hidden**2, hidden**2, 4 * hidden**2, 4 * hidden**2)
    shape = ModelShape(
        tensors=(vocab_size * hidden, length * hidden, *layer * layers),
        largest_layer=sum(layer),
        head=vocab_size * hidden,
        layers=layers,
        hidden=hidden,
        attention=hidden,
        key_value=hidden,
        intermediate=4 * hidden,
        gated=False,
        heads=max(1, hidden // 128),
    )
    flops = forward_flops(sum(layer) * layers + shape.head, layers, hidden, length, causal=False)
    return PlannedModel(shape, flops, "known point")


def profiled_model(shape: Shape, length: int) -> PlannedModel:
    """Describe a model of a `Setting`, with Qwen2's layers and a tied head, on sequences of `length` tokens."""
    key_value = shape.hidden_size // shape.num_attention_heads * shape.num_key_value_heads
    attention = 2 * shape.hidden_size * (shape.hidden_size + key_value)
    layer = (attention, *[shape.hidden_size * shape.intermediate_size] * 3)
    head = shape.vocab_size * shape.hidden_size
    model = ModelShape(
        tensors=(head, *layer * shape.num_hidden_layers),
        largest_layer=sum(layer),
        head=head,
        layers=shape.num_hidden_layers,
        hidden=shape.hidden_size,
        attention=shape.hidden_size,
        key_value=key_value,
        intermediate=shape.intermediate_size,
        gated=True,
        heads=shape.num_attention_heads,
    )
    flops = forward_flops(sum(layer) * model.layers + head, model.layers, shape.hidden_size, length, causal=False)
    return PlannedModel(model, flops, "known point")
