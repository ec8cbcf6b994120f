"""The plan of a run: memory, time, FLOPs, disks, advice and assumptions; also as JSON. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ddk_ds.config import Config
from ddk_ds.engine.flops import RunFlops, run_flops, training_flops
from ddk_ds.engine.memory_estimate import MEMORY_MARGIN, OPTIMIZER_BYTES
from ddk_ds.engine.model_files import COMPUTE_BYTES
from ddk_ds.planner.advice import Advice, advise
from ddk_ds.planner.faster import Faster, faster_steps
from ddk_ds.planner.gpu_memory import MemoryPlan, placed, plan_memory
from ddk_ds.planner.gpus import LINK_EFFICIENCY, MEMORY_EFFICIENCY, Cluster, Speed
from ddk_ds.planner.plan_inputs import Models, PlannedData
from ddk_ds.planner.simulations import LayoutPoint, advised, layouts_on
from ddk_ds.planner.step_time import (
    COMPILED,
    HOST_S_PER_LAYER,
    Step,
    TeacherGathers,
    simulate_step,
    teacher_gathers,
)
from ddk_ds.planner.teacher_cache_plan import CachePlan, plan_cache

WORTH_A_CHANGE = 1.05
"""Simulated speed over the configured one's from which a place of the teacher's weights is worth a change."""


@dataclass(frozen=True)
class Checkpoints:
    """Sizes and times of a run's checkpoints and of its exported student."""

    num_bytes: int
    """Size of one checkpoint."""
    kept_bytes: int
    """Size of all checkpoints on the disk at a time: the kept ones, and one that is being written."""
    write_s: float
    """Time from the beginning of writing a checkpoint to its end."""
    pause_s: float
    """Time that training waits for a checkpoint."""
    apart_s: float
    """Time from one checkpoint to the next."""
    export_bytes: int


@dataclass(frozen=True)
class Plan:
    """Everything that a plan says about a run."""

    config: Config
    cluster: Cluster
    models: Models
    data: PlannedData
    memory: MemoryPlan
    flops: RunFlops
    mfu: float
    measured: bool
    """True if the speed is a measured one, False if its MFU is assumed."""
    tokens_per_s: float
    hours: float
    step: Step
    gathers: TeacherGathers | None
    """Gathers of the teacher's weights in a step; None if no teacher computes."""
    better_place: LayoutPoint | None
    """A place of the teacher's weights with which the simulated step is faster by `WORTH_A_CHANGE`, or None."""
    faster: list[Faster]
    """Compiled layers and a teacher in 8 bits, if one computes."""
    checkpoints: Checkpoints
    advice: list[Advice]
    assumptions: list[str]

    @property
    def gpu_hours(self) -> float:
        """Return the hours of the run times the number of GPUs."""
        return self.hours * self.cluster.ranks

    @property
    def least_hours(self) -> float:
        """Return the hours of the run if every step took as long as the simulated one."""
        return self.data.steps * self.step.seconds / 3600

    @property
    def flop_per_s(self) -> float:
        """Return the model FLOPs that the cluster computes each second."""
        return self.mfu * self.cluster.gpu.peak_flop_per_s * self.cluster.ranks

    @property
    def tokens(self) -> int:
        """Return the number of tokens that the run draws from its start to its end."""
        return self.data.steps * self.config.train.global_batch_samples * self.config.data.sequence_length

    @property
    def cache(self) -> CachePlan | None:
        """Return the plan of the teacher's cache; None without one."""
        return plan_cache(self.config, self.data, self.flops, self.tokens, self.flop_per_s, self.models.vocab_size)

    @property
    def read_bytes_per_s(self) -> float:
        """Return the rate at which all nodes together must read the shards, in bytes of tokens per second."""
        return self.tokens_per_s * self.data.token_bytes


def make_plan(config: Config, models: Models, data: PlannedData, cluster: Cluster, speed: Speed) -> Plan:
    """Plan the run on that cluster. Raises ConfigError where the batch is no multiple of all GPUs' micro-batches."""
    config.micro_batches(cluster.ranks)
    config = placed(config, models, cluster)
    teacher = None if models.teacher is None else models.teacher.forward_flops
    student = models.student.forward_flops
    flops = run_flops(config, student, teacher, steps=data.steps, measurements=data.measurements, domains=data.domains)
    flops_per_token = training_flops(config, student, teacher or 0.0)
    peak = cluster.gpu.peak_flop_per_s
    mfu = speed.mfu
    if mfu is None:
        assert speed.tokens_per_s_per_gpu is not None, "neither of the two speeds is given"
        # A ledger counts targets; the others cost as much.
        mfu = speed.tokens_per_s_per_gpu / data.target_share * flops_per_token / peak
    tokens_per_s = mfu * peak * cluster.ranks / flops_per_token
    memory = plan_memory(config, models, cluster)
    storage = speed.storage_bytes_per_s
    step = simulate_step(config, models, cluster, domains=data.domains, storage_bytes_per_s=storage)
    step_s = config.train.global_batch_samples * config.data.sequence_length / tokens_per_s
    gathers = teacher_gathers(config, models, cluster)
    better_place, faster = None, list[Faster]()
    if gathers is not None and config.teacher is not None and config.teacher.whole_layers:
        forms = [config.teacher.quantize]
        layouts = layouts_on(config, models, cluster, domains=data.domains, storage_bytes_per_s=storage, forms=forms)
        better_place = advised([point for point in layouts if _is_better(point, step, cluster)])
        faster = faster_steps(config, models, cluster, step, domains=data.domains, storage_bytes_per_s=storage)
    checkpoints = _checkpoints(config, models, speed, step, step_s)
    waits_s = data.steps // config.checkpoint.every_steps * checkpoints.pause_s
    return Plan(
        config=config,
        cluster=cluster,
        models=models,
        data=data,
        memory=memory,
        flops=flops,
        mfu=mfu,
        measured=speed.mfu is None,
        tokens_per_s=tokens_per_s,
        hours=(flops.own / (mfu * peak * cluster.ranks) + waits_s) / 3600,
        step=step,
        gathers=gathers,
        better_place=better_place,
        faster=faster,
        checkpoints=checkpoints,
        advice=[] if memory.fits else advise(config, models, cluster),
        assumptions=_assumptions(config, cluster, data, speed),
    )


def _is_better(point: LayoutPoint, step: Step, cluster: Cluster) -> bool:
    return point.tokens_per_s_per_gpu * cluster.ranks > WORTH_A_CHANGE * step.tokens_per_s


def _checkpoints(config: Config, models: Models, speed: Speed, step: Step, step_s: float) -> Checkpoints:
    parameters, compute = models.student.shape.parameters, COMPUTE_BYTES[config.train.precision]
    num_bytes = (OPTIMIZER_BYTES + compute) * parameters
    every = config.checkpoint.every_steps
    return Checkpoints(
        num_bytes=num_bytes,
        kept_bytes=(config.checkpoint.keep_last + 1) * num_bytes,
        write_s=num_bytes / speed.storage_bytes_per_s,
        pause_s=step.parts["checkpoint"] * every,
        apart_s=every * step_s,
        export_bytes=compute * parameters,
    )


def _assumptions(config: Config, cluster: Cluster, data: PlannedData, speed: Speed) -> list[str]:
    gpu = cluster.gpu
    measured = speed.mfu is None
    speed_text = (
        f"speed: {speed.tokens_per_s_per_gpu:,.0f} tokens/s a GPU, as measured"
        if measured
        else f"speed: MFU {speed.mfu:.0%} of the peak (not measured; recomputation and waiting lower what to give)"
    )
    lines = [
        f"GPU: {gpu.peak_flop_per_s / 1e12:,.0f} TFLOP/s dense bf16, {gpu.memory_bytes / 1e9:,.0f} GB; one way, GB/s: "
        f"HBM {gpu.hbm_bytes_per_s / 1e9:,.0f}, NVLink {gpu.nvlink_bytes_per_s / 1e9:,.0f}, network "
        f"{gpu.network_bytes_per_s / 1e9:,.0f}, host {gpu.host_bytes_per_s / 1e9:,.0f} ({gpu.source})",
        f"memory: by engine/memory_estimate.py; {1 - MEMORY_MARGIN:.0%} of a device is left to the allocator's holes",
        "FLOPs: 2 a weight and token, embeddings looked up, heads and the whole square of attention counted; backward "
        "twice forward; nothing recomputed; of a mixture of experts those that a token is sent to",
        speed_text,
        f"controller: {data.domains} domains x {config.data.validation_samples} samples; the student "
        f"{data.measurements} times, the teacher once ({data.source})",
        f"simulated step: matmuls at {gpu.compute_efficiency:.0%} of the peak, links at {LINK_EFFICIENCY:.0%} and HBM "
        f"at {MEMORY_EFFICIENCY:.0%} of nominal, {HOST_S_PER_LAYER * 1e3:g} ms of the host a layer's pass, "
        "no waiting for data",
        "layers that are not compiled: their small kernels move bytes as counted by hand, which compile_layers spares, "
        f"with {1 - COMPILED:.0%} of the host's time (measured on a CPU), and all of it for a teacher within a GPU: "
        "estimated, no GPU has measured compiled layers",
        f"disks: {data.token_bytes} bytes a token; checkpoints written at {speed.storage_bytes_per_s / 1e9:g} GB/s in "
        f"all, {'in the background' if config.checkpoint.in_background else 'while training waits'}",
    ]
    if data.target_share < 1:
        lines.append(
            f"targets: {data.target_share:.0%} of the samples' tokens (conversations); a plan's tokens/s are of all "
            "tokens, a given speed is a ledger's, of targets"
        )
    if config.train.precision == "fp32":
        lines.append("train.precision is fp32: the peak is bf16's, and an fp32 run reaches a fraction of it")
    kind = "none" if config.teacher is None else config.teacher.quantize
    if kind != "none":
        peak = gpu.peak_in_8_bits(kind)
        rate = "" if peak is None else f"at {gpu.compute_efficiency:.0%} of {peak / 1e12:,.0f} TFLOP/s dense, "
        lines.append(
            f"teacher.quantize is {kind}: its linear layers {rate}with kernels around them whose bytes are counted by "
            "hand, and that in the simulated step alone: estimated, not measured. Every MFU is of bf16's peak, and an "
            f"assumed one knows nothing of {kind}"
        )
    if config.stop.discrepancy is not None:
        lines.append("stop.discrepancy may end the run earlier")
    if config.preset.one_of_stages:
        lines.append(f"method {config.method}: only this stage is planned, without its filters or domain weights")
    return lines


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the content of `--json`; values are in bytes, seconds and FLOPs unless a key names another unit."""
    flops = {"cpt": plan.flops.cpt, "kd": plan.flops.kd, "ddk": plan.flops.ddk}
    memory, step = plan.memory, plan.step
    return {
        "config": plan.config.name,
        "method": plan.config.method,
        "cluster": {"nodes": plan.cluster.nodes, "gpus_per_node": plan.cluster.gpus_per_node},
        "gpu": plan.cluster.gpu.model_dump(),
        "parameters": {
            "student": plan.models.student.shape.parameters,
            "teacher": None if plan.models.teacher is None else plan.models.teacher.shape.parameters,
        },
        "active_weights": {
            "student": plan.models.student.active_weights,
            "teacher": None if plan.models.teacher is None else plan.models.teacher.active_weights,
        },
        "flops": flops,
        "tflops": {name: None if value is None else value / 1e12 for name, value in flops.items()},
        "flops_of_this_run": plan.flops.own,
        "controller_flops": plan.flops.controller,
        "kd_over_cpt": plan.flops.kd_over_cpt,
        "ddk_over_kd": plan.flops.ddk_over_kd,
        "memory_bytes": {**memory.device_parts, **memory.host_parts},
        "device_bytes": memory.device_bytes,
        "usable_bytes": memory.usable_bytes,
        "host_bytes_per_node": memory.host_bytes,
        "activation_bytes": memory.activations,
        "fits": memory.fits,
        "max_micro_batch": memory.max_micro_batch,
        "max_micro_batch_that_divides": memory.max_dividing,
        "steps": plan.data.steps,
        "tokens": plan.tokens,
        "measurements": plan.data.measurements,
        "mfu": plan.mfu,
        "tokens_per_s": plan.tokens_per_s,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "simulated_step": {
            "parts_s": step.parts,
            "seconds": step.seconds,
            "tokens_per_s": step.tokens_per_s,
            "mfu": step.mfu,
        },
        "teacher_gathers": None if plan.gathers is None else asdict(plan.gathers),
        "better_place_of_the_teacher": None if plan.better_place is None else asdict(plan.better_place),
        "shard_bytes": plan.data.shard_bytes,
        "teacher_cache_bytes": 0.0 if plan.cache is None else plan.cache.num_bytes,
        "teacher_cache": None if plan.cache is None else asdict(plan.cache),
        "read_bytes_per_s": plan.read_bytes_per_s,
        "checkpoint": asdict(plan.checkpoints),
        "faster": [asdict(faster) for faster in plan.faster],
        "advice": [asdict(advice) for advice in plan.advice],
        "assumptions": plan.assumptions,
    }
