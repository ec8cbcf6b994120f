"""A simulated optimizer step: computation, and the communication that computation does not hide. Pure.

The simulation, part by part:

- A collective of S bytes over n ranks takes S (n - 1) / n over a bandwidth, and a latency for each of its calls. A ring
  through all ranks crosses each node's border once in each of its adapters, so between nodes the bandwidth is that of
  all the adapters of a node together; the slower of NVLink and network counts.
- The latency of a call is NCCL's own model of a ring (src/graph/tuning.cc, Simple protocol): 8.4 us, 3.4 us for each
  hop in a node, 14 us for each between nodes. NCCL 2.23 and later has faster algorithms for short messages.
- Layers are gathered while the one before computes: a pass takes its first gather, and then the longest of
  computation, communication and the host's own time for ZeRO-3's hooks (DeepSpeed's are Python, for each module).
- The teacher's layers are gathered once for `teacher.micro_batches_per_pass` micro-batches, from the ranks that
  `teacher.shard_within` names. Its head is gathered by hand (engine/head.py): taken as hidden by nothing.
- A student's backward gathers again what its forward released, and reduces the gradients of every micro-batch, each
  of 4 bytes or 2 (`train.reduce_dtype`).
- A pass computes its matmuls, and between them kernels that only move bytes (layer_time.py). A backward pass has two
  products for each of the forward pass.
- A pass gathers its layers, and embedding and last norm by themselves; gradients are reduced in the same calls. That
  and the four reductions of a step's numbers are counted in tests/dist/test_collectives.py. Without `whole_layers`
  each small tensor of the student is gathered by itself after an update.
- The reductions wait for each other, and the host for the last one: the GPU is idle until the host has queued the
  update and the next step's first layer, taken as its time for one layer.
- A kernel that only moves bytes takes the bandwidth of the GPU's memory: the loss's row kernel moves 18 bytes a logit
  (docs/design.md), the optimizer 30 a parameter of the shard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from ddk_ds.config import Config, Model
from ddk_ds.config.sections import Teacher
from ddk_ds.engine.ds_config import RELIED_ON
from ddk_ds.engine.flops import teacher_runs, training_flops
from ddk_ds.engine.memory_estimate import OPTIMIZER_BYTES, REDUCE_BYTES
from ddk_ds.engine.model_files import COMPUTE_BYTES, ModelShape
from ddk_ds.errors import ConfigError
from ddk_ds.planner.gpus import LINK_EFFICIENCY, MEMORY_EFFICIENCY, Cluster
from ddk_ds.planner.layer_time import ROUNDED_BYTES, SMALL_BACKWARD, between_matmuls_s, conversion_s, token_s
from ddk_ds.planner.plan_inputs import Models, PlannedModel

Within = Literal["world", "node", "gpu"]
"""Ranks that a model's shards lie on: all, those of a node, or one."""

CALL_S, HOP_IN_NODE_S, HOP_BETWEEN_NODES_S = 8.4e-6, 3.4e-6, 14.0e-6
REUSE_ELEMENTS: int = RELIED_ON["zero_optimization.stage3_max_reuse_distance"]
"""A parameter stays gathered if its next use is at most that many elements ahead."""
HOST_S_PER_LAYER = 8.8e-3
"""Host's time for a pass over one layer.

Of the 704 ms a step of engine_run in docs/results/gpu_suite_h100.json, all except head and optimizer, divided by its 76
passes over a layer (docs/planning.md).
"""
WHOLE_LAYERS = 0.48
"""Share of HOST_S_PER_LAYER that is left with `whole_layers`.

Measured by tools/bench/bench_step.py --size host on a CPU, not on a GPU.
"""
WITHOUT_ZERO = 0.23
"""Share of HOST_S_PER_LAYER for plain modules, a teacher's within a GPU; an upper bound.

Of the 192 ms that the same step takes in plain torch (docs/results/gpu_suite_h100.json), less head and optimizer, each
of the 76 passes has 2.1 ms at most: the time of the GPU is in it.
"""
COMPILED = 0.60
"""Share of the host's time that is left with `compile_layers`; a teacher within a GPU is a CUDA graph, and has none.

Measured by tools/bench/bench_step.py --size host on a CPU, not on a GPU. That a graph has none is an assumption.
"""
ROW_KERNEL_BYTES, UPDATE_BYTES = 18, 30
APART = 2
"""Gathers of a pass beside its layers': embedding and last norm."""
REDUCTIONS = 4
"""Reductions of numbers in a step: of its tokens, two for the gradient's norm, and of its sums."""
SMALL_ELEMENTS: int = RELIED_ON["zero_optimization.stage3_param_persistence_threshold"]
"""Without `whole_layers` tensors of the student of at most that many elements stay complete on every rank."""
NOT_HIDDEN = "communication not hidden"
"""Name of a part of a step, after "teacher: " or "student: "."""
_HOST_PART = "host's hooks not hidden"


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step by part: `parts` add up to `seconds`."""

    parts: dict[str, float]
    tokens: int
    flops: float
    """Model FLOPs of all ranks, nothing that is computed a second time."""
    peak_flop_per_s: float
    """Sum of the peaks of all ranks."""

    @property
    def seconds(self) -> float:
        """Return the time of the step, with its share of measurements and checkpoints."""
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        """Return the tokens that all ranks together train on per second."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Return the model FLOPs utilisation, from 0 to 1: FLOPs per second over the peak of all ranks' GPUs."""
        return self.flops / self.seconds / self.peak_flop_per_s


def simulate_step(
    config: Config,
    models: Models,
    cluster: Cluster,
    *,
    domains: int,
    storage_bytes_per_s: float,
    host_s_per_layer: float = HOST_S_PER_LAYER,
) -> Step:
    """Simulate one step of the run on that cluster, with its share of a measurement and of a checkpoint.

    Raises ConfigError where the batch is not a multiple of the micro-batches of all ranks.
    """
    simulation = _Simulation(config, models, cluster, host_s_per_layer)
    parts: dict[str, float] = {}
    simulation.add_micro_batches(parts, config.micro_batches(cluster.ranks))
    parts["optimizer"] = simulation.update_s()
    parts["waits: reductions, and the host begins anew"] = simulation.waits_s()
    parts["controller"] = simulation.measurement_s(domains) / config.mixture.interval_steps
    parts["checkpoint"] = simulation.checkpoint_s(storage_bytes_per_s) / config.checkpoint.every_steps
    tokens = config.train.global_batch_samples * config.data.sequence_length
    teacher = 0.0 if models.teacher is None else models.teacher.forward_flops
    flops = tokens * training_flops(config, models.student.forward_flops, teacher)
    return Step(parts, tokens, flops, cluster.ranks * cluster.gpu.peak_flop_per_s)


@dataclass(frozen=True)
class TeacherGathers:
    """The teacher's weights that one GPU gathers in a step, beside the time that it computes with them."""

    num_bytes: float
    """Bytes of the gathered weights; 0 if each GPU has all of them."""
    seconds: float
    """Seconds on the links."""
    compute_s: float
    """Seconds of the teacher's matmuls, which hide them."""


def teacher_gathers(config: Config, models: Models, cluster: Cluster) -> TeacherGathers | None:
    """Return what a step gathers of the teacher; None in a run in which no teacher computes."""
    teacher = models.teacher
    if teacher is None or config.teacher is None or not teacher_runs(config):
        return None
    count, within = config.micro_batches(cluster.ranks), config.teacher.place
    passes = math.ceil(count / config.teacher.pass_size)
    simulation = _Simulation(config, models, cluster, HOST_S_PER_LAYER)
    one = simulation.forward(teacher, simulation.micro_batch_tokens, within)
    elements = teacher.shape.as_sharded(config.teacher, config.train.precision).parameters
    gathered = simulation.compute_bytes * elements if one.communication_s else 0
    return TeacherGathers(passes * gathered, passes * one.communication_s, count * one.compute_s)


def latency_s(ranks: int, nodes: int, rounds: int = 1) -> float:
    """Return the seconds of a call that moves nothing over `ranks` on `nodes`; an all-reduce has two rounds."""
    hops = (ranks - nodes) * HOP_IN_NODE_S + (nodes * HOP_BETWEEN_NODES_S if nodes > 1 else 0.0)
    return CALL_S + rounds * hops


def collective_s(num_bytes: float, calls: int, cluster: Cluster, within: Within = "world") -> float:
    """Return the seconds that all-gathers (or reduce-scatters) of `num_bytes` in all take, made in `calls` calls."""
    ranks, nodes = {
        "world": (cluster.ranks, cluster.nodes),
        "node": (cluster.gpus_per_node, 1),
        "gpu": (1, 1),
    }[within]
    if ranks == 1:
        return 0.0
    moved = num_bytes * (ranks - 1) / ranks / LINK_EFFICIENCY
    seconds = moved / cluster.gpu.nvlink_bytes_per_s if ranks > nodes else 0.0
    if nodes > 1:
        seconds = max(seconds, moved / (cluster.gpus_per_node * cluster.gpu.network_bytes_per_s))
    return seconds + calls * latency_s(ranks, nodes)


@dataclass(frozen=True)
class _Pass:
    """Seconds of one pass over a model's layers."""

    compute_s: float
    communication_s: float
    first_s: float
    """Seconds of the first gather, which nothing hides."""
    host_s: float
    exchange_s: float = 0.0
    """Seconds of the exchanges in attention between the ranks of a sample."""
    inputs_s: float = 0.0
    """Seconds of the layers' inputs on their way to the host and back."""

    def add_to(self, parts: dict[str, float], model: str, times: int) -> None:
        """Add `times` of this pass to the parts of a step; the model is "teacher" or "student"."""
        device_s = max(self.compute_s, self.communication_s)
        pass_parts = {
            f"{model}: compute": self.compute_s,
            f"{model}: {NOT_HIDDEN}": self.first_s + device_s - self.compute_s,
            _HOST_PART: max(0.0, self.host_s - device_s),
        }
        if self.exchange_s:
            pass_parts[f"{model}: exchanges in attention"] = self.exchange_s
        if self.inputs_s:
            pass_parts[f"{model}: layers' inputs to the host and back"] = self.inputs_s
        for part, seconds in pass_parts.items():
            parts[part] = parts.get(part, 0.0) + times * seconds


class _Simulation:
    """One run on one cluster; methods ending in _s return seconds."""

    def __init__(self, config: Config, models: Models, cluster: Cluster, host_s_per_layer: float) -> None:
        self.config, self.models, self.cluster, self.host_s_per_layer = config, models, cluster, host_s_per_layer
        self.compute_bytes = COMPUTE_BYTES[config.train.precision]
        self.flop_per_s = cluster.gpu.peak_flop_per_s * cluster.gpu.compute_efficiency
        self.memory_bytes_per_s = cluster.gpu.hbm_bytes_per_s * MEMORY_EFFICIENCY
        self.sharing = config.train.sequence_parallel
        self.micro_batch_tokens = config.micro_batch_tokens
        kind = config.teacher.quantize if config.teacher is not None and teacher_runs(config) else "none"
        if kind in ROUNDED_BYTES and cluster.gpu.peak_in_8_bits(kind) is None:
            number = kind.removesuffix("_dynamic")
            raise ConfigError(
                f"teacher.quantize: {kind}: {cluster.gpu.name} has no {number} products (a file of a GPU's figures "
                f"says {number}_peak_flop_per_s): set int8 or none, or another --gpu"
            )

    def add_micro_batches(self, parts: dict[str, float], count: int) -> None:
        """Add a rank's `count` micro-batches of a step to the step's parts."""
        student, teacher = self.models.student, self.models.teacher
        num_models = 1
        if teacher is not None and self.config.teacher is not None and teacher_runs(self.config):
            num_models = 2
            within = self.config.teacher.place
            per_pass = 1 if within == "gpu" else self.config.teacher.pass_size
            passes = [per_pass] * (count // per_pass) + [count % per_pass] * (count % per_pass > 0)
            for micro_batches in passes:
                tokens = micro_batches * self.micro_batch_tokens
                self.forward(teacher, tokens, within, skip_head=True).add_to(parts, "teacher", 1)
            parts[f"teacher: {NOT_HIDDEN}"] += len(passes) * self.gather_s(teacher.shape.head, 1, within)
        self.forward(student, self.micro_batch_tokens, "world").add_to(parts, "student", count)
        if not self.config.preset.freezes_student:
            self.backward(student).add_to(parts, "student", count)
        logits = num_models * self.micro_batch_tokens * self.models.vocab_size
        # The row kernel reads and writes the student's logits and reads the teacher's: 18 bytes for both together.
        parts["loss: row kernel"] = count * logits * ROW_KERNEL_BYTES / 2 / self.memory_bytes_per_s

    def forward(self, model: PlannedModel, tokens: int, within: Within, *, skip_head: bool = False) -> _Pass:
        """Return a forward pass over `tokens`; `skip_head` where the head is gathered by hand."""
        shape = model.shape
        if self.config.teacher is not None and model is self.models.teacher:
            shape = shape.as_sharded(self.config.teacher, self.config.train.precision)
        elements = shape.parameters - (shape.head if skip_head else 0)
        return _Pass(
            compute_s=self.compute_s(model, tokens),
            communication_s=self.gather_s(elements, shape.layers + APART, within),
            first_s=self.gather_s(elements / max(1, shape.layers), 1, within),
            host_s=self.hooks_s(model),
            exchange_s=self.exchange_s(shape, tokens),
        )

    def section(self, model: PlannedModel) -> Model:
        """Return the section of the configuration that the model is of."""
        teacher = self.config.teacher if model is self.models.teacher else None
        return teacher or self.config.student

    def compute_s(self, model: PlannedModel, tokens: int) -> float:
        """Return the time of a forward pass over `tokens`, of one micro-batch or of several."""
        options = self.section(model), self.config.train.precision, self.cluster.gpu
        converted_s = conversion_s(model, *options) * tokens / self.micro_batch_tokens
        return tokens * token_s(model, *options) + converted_s

    def backward(self, model: PlannedModel) -> _Pass:
        """Return a backward pass: two products for each of the forward pass, and what checkpointing recomputes."""
        shape = model.shape
        # Selective checkpointing recomputes neither products nor attention.
        checkpointing = self.config.student.gradient_checkpointing
        recomputes = checkpointing is True
        recomputed_flops = model.forward_flops - model.head_flops if recomputes else 0.0
        passes = SMALL_BACKWARD + (1 if checkpointing else 0)
        small_s = passes * between_matmuls_s(model, self.config.student, self.cluster.gpu)
        # A layer at a distance d from the end is used again after 2 d elements.
        kept = min(shape.parameters, REUSE_ELEMENTS // 2)
        gathers_s = self.gather_s(shape.parameters - kept, shape.layers) if kept < shape.parameters else 0.0
        reduce_bytes = REDUCE_BYTES[self.config.train.reduce_dtype]
        return _Pass(
            compute_s=self.micro_batch_tokens
            * ((2 * model.forward_flops + recomputed_flops) / self.flop_per_s + small_s),
            communication_s=gathers_s + self.collectives_s(reduce_bytes, shape.parameters, shape.layers + APART),
            first_s=0.0,
            host_s=self.hooks_s(model) * (2 if checkpointing else 1),
            exchange_s=self.exchange_s(shape, self.micro_batch_tokens) * (2 if recomputes else 1),
            inputs_s=self.inputs_s(shape),
        )

    def inputs_s(self, shape: ModelShape) -> float:
        """Return the time in which the layers' inputs go to the host and come back, while the computation waits."""
        if self.config.student.offload_activations == "none":
            return 0.0
        elements = shape.layers * self.micro_batch_tokens * shape.hidden
        return 2 * self.compute_bytes * elements / self.cluster.gpu.host_bytes_per_s

    def exchange_s(self, shape: ModelShape, tokens: int) -> float:
        """Return the time of a pass's exchanges in attention between the ranks of a sample, which nothing hides."""
        group = replace(self.cluster, gpus_per_node=min(self.sharing, self.cluster.gpus_per_node))
        group = replace(group, nodes=max(1, self.sharing // group.gpus_per_node))
        width = 2 * shape.attention + 2 * max(shape.key_value, shape.attention // shape.heads * self.sharing)
        return collective_s(self.compute_bytes * tokens * width * shape.layers, 4 * shape.layers, group)

    def hooks_s(self, model: PlannedModel) -> float:
        """Return the host's time for a pass over the layers, most of which is ZeRO-3's hooks."""
        return model.shape.layers * self.host_s_per_layer * self.host_share(model)

    def host_share(self, model: PlannedModel) -> float:
        """Return the share of `host_s_per_layer` that the model's options leave."""
        section = self.section(model)
        if isinstance(section, Teacher) and section.place == "gpu":
            return 0.0 if section.compile_layers else WITHOUT_ZERO
        share = WHOLE_LAYERS if section.whole_layers else 1.0
        return share * COMPILED if section.compile_layers else share

    def waits_s(self) -> float:
        """Return the time in which the GPU is idle around a step's update: see the module's text."""
        ranks, nodes, student = self.cluster.ranks, self.cluster.nodes, self.models.student
        reduced_s = REDUCTIONS * latency_s(ranks, nodes, rounds=2) if ranks > 1 else 0.0
        small = [size for size in student.shape.tensors if size <= SMALL_ELEMENTS]
        if not self.config.student.whole_layers and not self.config.preset.freezes_student:
            reduced_s += collective_s(self.compute_bytes * sum(small), len(small), self.cluster)
        teacher = self.models.teacher if teacher_runs(self.config) else None
        return reduced_s + self.host_s_per_layer * self.host_share(teacher or student)

    def gather_s(self, elements: float, layers: int, within: Within = "world") -> float:
        """Return the time of gathers of weights, see `collectives_s`."""
        return self.collectives_s(self.compute_bytes, elements, layers, within)

    def collectives_s(self, element_bytes: int, elements: float, layers: int, within: Within = "world") -> float:
        """Return the time of one call for each layer (engine/ds_config.py), or of as many as `deepspeed:` asks for."""
        ahead = self.config.deepspeed.get("zero_optimization", {}).get("stage3_prefetch_bucket_size")
        calls = layers if ahead is None else max(layers, math.ceil(elements / ahead))
        return collective_s(element_bytes * elements, calls, self.cluster, within)

    def update_s(self) -> float:
        """Return the time of the optimizer's update of a rank's shard."""
        if self.config.preset.freezes_student:
            return 0.0  # the filters are not planned
        shard = self.models.student.shape.shard(self.cluster.ranks)
        seconds = shard * UPDATE_BYTES / self.memory_bytes_per_s
        if self.config.optimizer.offload != "none":
            # Gradients go to the host and weights come back; the host's own update is not counted.
            seconds += shard * (4 + self.compute_bytes) / self.cluster.gpu.host_bytes_per_s
        return seconds

    def measurement_s(self, domains: int) -> float:
        """Return the time of measuring the student's perplexity on all domains."""
        per_rank = math.ceil(self.config.data.validation_samples * self.sharing / self.cluster.ranks)
        samples = min(per_rank, self.config.train.micro_batch_samples)
        passes = domains * math.ceil(per_rank / self.config.train.micro_batch_samples)
        parts: dict[str, float] = {}
        tokens = samples * self.config.data.sequence_length // self.sharing
        forward = self.forward(self.models.student, tokens, "world")
        forward.add_to(parts, "student", passes)
        return sum(parts.values())

    def checkpoint_s(self, storage_bytes_per_s: float) -> float:
        """Return the time that training waits for a checkpoint: the copy to the host, or all of the writing."""
        shape, parameter_bytes = self.models.student.shape, OPTIMIZER_BYTES + self.compute_bytes
        if self.config.checkpoint.in_background:
            return shape.shard(self.cluster.ranks) * parameter_bytes / self.cluster.gpu.host_bytes_per_s
        return shape.parameters * parameter_bytes / storage_bytes_per_s
