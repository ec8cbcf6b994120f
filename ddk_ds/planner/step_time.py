"""A simulated optimizer step: computation, and what of communication it does not hide. Pure.

The model, part by part:

- A collective of S bytes over n ranks takes S (n - 1) / n over a bandwidth, and a latency for each of its calls. A ring
  through all ranks crosses each node's border once in each of its adapters, so between nodes the bandwidth is that of
  all the adapters of a node together; the slower of NVLink and network counts.
- The latency of a call is NCCL's own model of a ring (src/graph/tuning.cc, Simple protocol): 8.4 us, 3.4 us for each
  hop in a node, 14 us for each between nodes. NCCL 2.23 and later has faster algorithms for short messages.
- Layers are gathered while the one before computes: a pass takes its first gather, and then the longest of
  computation, communication and the host's own time for ZeRO-3's hooks (DeepSpeed's are Python, for each module).
- The teacher's layers come once for `teacher.micro_batches_per_pass` micro-batches, from the ranks that
  `teacher.shard_within` names. Its head is gathered by hand around the loss (engine/head.py): nothing hides it.
- A student's backward gathers again what its forward released, and reduces bf16 gradients of every micro-batch.
- What only moves bytes through the GPU's memory takes its bandwidth: the loss's row kernel 18 bytes a logit
  (docs/kernel.md), the optimizer 30 a parameter of the shard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ddk_ds.config import Config
from ddk_ds.engine.flops import teacher_runs
from ddk_ds.engine.memory_estimate import OPTIMIZER_BYTES
from ddk_ds.engine.model_files import COMPUTE_BYTES
from ddk_ds.planner.gpu_memory import Models, PlannedModel
from ddk_ds.planner.gpus import LINK_EFFICIENCY, MEMORY_EFFICIENCY, Cluster

Within = Literal["world", "node", "gpu"]

CALL_S, HOP_IN_NODE_S, HOP_BETWEEN_NODES_S = 8.4e-6, 3.4e-6, 14.0e-6
# How far ahead a parameter's next use may be for it to stay gathered, in elements: DeepSpeed's default.
REUSE_ELEMENTS = 1_000_000_000
# Host time of a layer's pass: of the 704 ms a step of engine_run in docs/results/gpu_suite_h100.json, all but head and
# optimizer, over its 76 passes of a layer (docs/planning.md).
HOST_S_PER_LAYER = 8.8e-3
# What is left of it where layers are gathered whole: by tools/bench/bench_step.py --size host on a CPU, not on a GPU.
WHOLE_LAYERS = 0.48
ROW_KERNEL_BYTES, UPDATE_BYTES = 18, 30


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step by part: `parts` add up to `seconds`."""

    parts: dict[str, float]
    tokens: int
    flops: float
    """Of all ranks, without what is computed again."""
    peak_flop_per_s: float
    """Of all ranks."""

    @property
    def seconds(self) -> float:
        """Of the step, with its share of measurements and checkpoints."""
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Share of the peak (model FLOPs utilisation)."""
        return self.flops / self.seconds / self.peak_flop_per_s


def collective_s(num_bytes: float, calls: int, cluster: Cluster, within: Within = "world") -> float:
    """Seconds of all-gathers (or reduce-scatters) of `num_bytes` in all, in so many calls."""
    ranks, nodes = {
        "world": (cluster.ranks, cluster.nodes),
        "node": (cluster.gpus_per_node, 1),
        "gpu": (1, 1),
    }[within]
    if ranks == 1:
        return 0.0
    moved = num_bytes * (ranks - 1) / ranks / LINK_EFFICIENCY
    seconds = moved / cluster.gpu.nvlink_bytes_per_s if ranks > nodes else 0.0
    latency = CALL_S + (ranks - nodes) * HOP_IN_NODE_S
    if nodes > 1:
        seconds = max(seconds, moved / (cluster.gpus_per_node * cluster.gpu.network_bytes_per_s))
        latency += nodes * HOP_BETWEEN_NODES_S
    return seconds + calls * latency


@dataclass(frozen=True)
class _Pass:
    """One pass over a model's layers."""

    compute_s: float
    communication_s: float
    first_s: float
    host_s: float

    def spend(self, name: str, parts: dict[str, float], times: int) -> None:
        """Add `times` of it to the parts of a step."""
        device = max(self.compute_s, self.communication_s)
        over = self.first_s + device - self.compute_s
        host = max(0.0, self.host_s - device)
        for part, seconds in ((f"{name}: compute", self.compute_s), (f"{name}: communication not hidden", over)):
            parts[part] = parts.get(part, 0.0) + times * seconds
        parts["host's hooks not hidden"] = parts.get("host's hooks not hidden", 0.0) + times * host


class _Simulation:
    def __init__(self, config: Config, models: Models, cluster: Cluster, host_s_per_layer: float) -> None:
        self.config, self.models, self.cluster, self.host_s_per_layer = config, models, cluster, host_s_per_layer
        self.compute = COMPUTE_BYTES[config.train.precision]
        self.rate = cluster.gpu.peak_flop_per_s * cluster.gpu.compute_efficiency
        self.memory_rate = cluster.gpu.hbm_bytes_per_s * MEMORY_EFFICIENCY
        self.tokens = config.train.micro_batch_samples * config.data.sequence_length

    def forward(self, model: PlannedModel, tokens: int, within: Within, *, skip_head: bool = False) -> _Pass:
        """A forward pass of `tokens`; without the head where that is gathered by hand."""
        shape = model.shape
        if self.config.teacher is not None and model is self.models.teacher:
            shape = shape.at_rest(self.config.teacher, self.config.train.precision)
        elements = shape.parameters - (shape.head if skip_head else 0)
        return _Pass(
            compute_s=tokens * model.forward_flops / self.rate,
            communication_s=self.gather(elements, shape.layers, within),
            first_s=self.gather(elements / max(1, shape.layers), 1, within),
            host_s=self.hooks(model),
        )

    def hooks(self, model: PlannedModel) -> float:
        """The host's time for ZeRO-3's hooks in a pass over the layers."""
        section = self.config.teacher if model is self.models.teacher else self.config.student
        whole = section is not None and section.whole_layers
        return model.shape.layers * self.host_s_per_layer * (WHOLE_LAYERS if whole else 1.0)

    def gather(self, elements: float, layers: int, within: Within = "world") -> float:
        """A call for each layer (engine/ds_config.py), or as `deepspeed:` has it."""
        ahead = self.config.deepspeed.get("zero_optimization", {}).get("stage3_prefetch_bucket_size")
        calls = layers if ahead is None else max(layers, math.ceil(elements / ahead))
        return collective_s(self.compute * elements, calls, self.cluster, within)

    def backward(self, model: PlannedModel) -> _Pass:
        """Two products for each of the forward pass's, and with gradient checkpointing its layers once more."""
        shape = model.shape
        # Selectively, products and attention are not done again.
        again = model.forward_flops - model.head_flops if self.config.student.gradient_checkpointing is True else 0.0
        # A layer at a distance d from the end is used again after 2 d elements.
        kept = min(shape.parameters, REUSE_ELEMENTS // 2)
        gathers = self.gather(shape.parameters - kept, shape.layers) if kept < shape.parameters else 0.0
        return _Pass(
            compute_s=self.tokens * (2 * model.forward_flops + again) / self.rate,
            communication_s=gathers + self.gather(shape.parameters, shape.layers),
            first_s=0.0,
            host_s=self.hooks(model) * (2 if self.config.student.gradient_checkpointing else 1),
        )

    def micro_batches(self, count: int, parts: dict[str, float]) -> None:
        """All of a rank's micro-batches of a step."""
        student, teacher = self.models.student, self.models.teacher
        num_models = 1
        if teacher is not None and self.config.teacher is not None and teacher_runs(self.config):
            num_models = 2
            within, together = self.config.teacher.shard_within, self.config.teacher.per_pass
            passes = [together] * (count // together) + [count % together] * (count % together > 0)
            for taken in passes:
                one = self.forward(teacher, taken * self.tokens, within, skip_head=True)
                one.spend("teacher", parts, 1)
            parts["teacher: communication not hidden"] += len(passes) * self.gather(teacher.shape.head, 1, within)
        self.forward(student, self.tokens, "world").spend("student", parts, count)
        self.backward(student).spend("student", parts, count)
        logits = num_models * self.tokens * self.models.vocab_size
        # The row kernel reads and writes the student's logits and reads the teacher's: 18 bytes for the two.
        parts["loss: row kernel"] = count * logits * ROW_KERNEL_BYTES / 2 / self.memory_rate

    def update(self) -> float:
        shard = self.models.student.shape.shard(self.cluster.ranks)
        seconds = shard * UPDATE_BYTES / self.memory_rate
        if self.config.optimizer.offload != "none":
            # Gradients go to the host and weights come back; the host's own update is not in it.
            seconds += shard * (4 + self.compute) / self.cluster.gpu.host_bytes_per_s
        return seconds

    def measurement(self, domains: int) -> float:
        """Perplexities of the student on all domains."""
        per_rank = math.ceil(self.config.data.validation_samples / self.cluster.ranks)
        passes = domains * math.ceil(per_rank / self.config.train.micro_batch_samples)
        parts: dict[str, float] = {}
        samples = min(per_rank, self.config.train.micro_batch_samples)
        one = self.forward(self.models.student, samples * self.config.data.sequence_length, "world")
        one.spend("student", parts, passes)
        return sum(parts.values())

    def checkpoint(self, storage_bytes_per_s: float) -> float:
        """Seconds that training waits for a checkpoint: the copy to the host, or all of the writing."""
        shape, state = self.models.student.shape, OPTIMIZER_BYTES + self.compute
        if self.config.checkpoint.in_background:
            return shape.shard(self.cluster.ranks) * state / self.cluster.gpu.host_bytes_per_s
        return shape.parameters * state / storage_bytes_per_s


def simulate_step(
    config: Config,
    models: Models,
    cluster: Cluster,
    *,
    domains: int,
    storage_bytes_per_s: float,
    host_s_per_layer: float = HOST_S_PER_LAYER,
) -> Step:
    """One step of the run on that cluster, with its share of a measurement and of a checkpoint.

    Raises ConfigError where the batch does not divide.
    """
    simulation = _Simulation(config, models, cluster, host_s_per_layer)
    parts: dict[str, float] = {}
    simulation.micro_batches(config.micro_batches(cluster.ranks), parts)
    parts["optimizer"] = simulation.update()
    parts["controller"] = simulation.measurement(domains) / config.mixture.interval_steps
    parts["checkpoint"] = simulation.checkpoint(storage_bytes_per_s) / config.checkpoint.every_steps
    tokens = config.train.global_batch_samples * config.data.sequence_length
    teacher = models.teacher.forward_flops if models.teacher is not None and teacher_runs(config) else 0.0
    flops = tokens * (3 * models.student.forward_flops + teacher)
    return Step(parts, tokens, flops, cluster.ranks * cluster.gpu.peak_flop_per_s)
