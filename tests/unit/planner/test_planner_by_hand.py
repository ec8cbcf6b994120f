"""The planner's figures on a cluster and models of round numbers, each computed here by hand from its definition."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import pytest

from ddk_ds.config import Config, make_config
from ddk_ds.config.sections import TeacherCache
from ddk_ds.engine.model_files import Matrix, ModelShape
from ddk_ds.errors import ConfigError
from ddk_ds.planner.gpu_memory import changed
from ddk_ds.planner.gpus import Cluster, Gpu, Speed
from ddk_ds.planner.plan_inputs import Models, PlannedData, PlannedModel
from ddk_ds.planner.run_plan import Plan, make_plan, plan_json
from ddk_ds.planner.step_time import Step, collective_s, simulate_step

# Kernels reach 0.8 of the 1e12 bytes/s, matmuls 0.5 of the 1e12 FLOP/s, collectives 0.8 of the links.
GPU = Gpu(
    name="round",
    peak_flop_per_s=1e12,
    memory_bytes=1e11,
    hbm_bytes_per_s=1e12,
    nvlink_bytes_per_s=1e10,
    network_bytes_per_s=1e9,
    host_bytes_per_s=2e10,
    compute_efficiency=0.5,
)
CLUSTER = Cluster(GPU, nodes=2, gpus_per_node=2)


def model(parameters: int, head: int, layers: int, flops: float) -> PlannedModel:
    shape = ModelShape(
        tensors=(head, parameters - head),
        largest_layer=(parameters - head) // layers,
        head=head,
        layers=layers,
        hidden=100,
        attention=100,
        key_value=100,
        intermediate=400,
        gated=True,
        heads=2,
    )
    return PlannedModel(shape, flops, "by hand")


STUDENT, TEACHER = model(1_000_000, 100_000, 4, 3e6), model(4_000_000, 400_000, 8, 1e7)
MODELS = Models(STUDENT, TEACHER, 1000)
# 4 ranks: each has 3 micro-batches of 2 x 100 tokens in a step.
VALUES: dict[str, Any] = {
    "name": "by-hand",
    "student": {"path": "s", "whole_layers": False},
    "teacher": {"path": "t", "micro_batches_per_pass": 2},
    "data": {"path": "d", "sequence_length": 100, "validation_samples": 10},
    "mixture": {"interval_steps": 50},
    "train": {"global_batch_samples": 24, "micro_batch_samples": 2},
    "checkpoint": {"every_steps": 20, "keep_last": 5},
    "optimizer": {"warmup_steps": 0},
    "stop": {"steps": 120},
}
HOST_S = 1e-3
# Small kernels beyond fused ones, of a layer and token: 2 x 34 x 100 of norms, 16 x 200 of rotary positions, 4 x 400.
SMALL_S = 11_600 / 0.8e12


def config_of(**sections: dict[str, Any]) -> Config:
    return changed(make_config(VALUES, "by hand"), **sections)


def gather_s(elements: float, calls: int, element_bytes: int = 2) -> float:
    """Return the time of a gather in bf16 over 4 ranks: 3/4 of it go over the 2 adapters of each node."""
    return element_bytes * elements * 3 / 4 / (0.8 * 2e9) + calls * (8.4e-6 + 2 * 3.4e-6 + 2 * 14e-6)


def reduce_s(elements: float, calls: int) -> float:
    """Return the time of a reduction of gradients in float32 over 4 ranks."""
    return gather_s(elements, calls, 4)


def waits_s(compute_s: float, elements: float, layers: int) -> float:
    """Return what a forward pass waits for gathers: the first one, and what is longer than its computation.

    Embedding and last norm are gathered by themselves.
    """
    return gather_s(elements / layers, 1) + max(0.0, gather_s(elements, layers + 2) - compute_s)


def hooks_s(device_s: float, layers: int, times: float = 1) -> float:
    return max(0.0, times * layers * HOST_S - device_s)


def simulated(config: Config, models: Models = MODELS, cluster: Cluster = CLUSTER) -> Step:
    return simulate_step(config, models, cluster, domains=3, storage_bytes_per_s=1e9, host_s_per_layer=HOST_S)


def test_every_part_of_a_step() -> None:
    """The teacher computes 2 micro-batches and then 1, without its head, which is gathered apart."""
    step = simulated(config_of())
    compute = {tokens: tokens * (1e7 / (0.5 * 1e12) + 8 * SMALL_S) for tokens in (400, 200)}
    teacher_waits = sum(waits_s(compute[tokens], 3.6e6, 8) + gather_s(4e5, 1) for tokens in compute)
    forward_s, backward_s = 200 * (3e6 / 5e11 + 4 * SMALL_S), 200 * (6e6 / 5e11 + 2.7 * 4 * SMALL_S)
    # The teacher's whole layers have 0.48 of the host's time, the student's modules all of it.
    hooks = sum(hooks_s(max(compute[tokens], gather_s(3.6e6, 10)), 8, 0.48) for tokens in compute)
    hooks += 3 * hooks_s(max(forward_s, gather_s(1e6, 6)), 4) + 3 * hooks_s(max(backward_s, reduce_s(1e6, 6)), 4)
    # A rank measures 3 of 10 samples of 3 domains, in passes of 2 and 1, which count as passes of 2.
    measured = forward_s + waits_s(forward_s, 1e6, 4) + hooks_s(max(forward_s, gather_s(1e6, 6)), 4)
    # Four reductions of numbers; the student's tensor of 100,000 elements by itself; the host's time for a layer.
    waits = 4 * (8.4e-6 + 2 * (2 * 3.4e-6 + 2 * 14e-6)) + gather_s(100_000, 1) + 0.48 * HOST_S
    expected = {
        "teacher: compute": compute[400] + compute[200],
        "teacher: communication not hidden": teacher_waits,
        "student: compute": 3 * (forward_s + backward_s),
        "student: communication not hidden": 3 * (waits_s(forward_s, 1e6, 4) + max(0.0, reduce_s(1e6, 6) - backward_s)),
        "host's hooks not hidden": hooks,
        "loss: row kernel": 3 * 200 * 1000 * 18 / (0.8 * 1e12),
        "optimizer": 250_000 * 30 / (0.8 * 1e12),
        "waits: reductions, and the host begins anew": waits,
        "controller": 3 * ceil(3 / 2) * measured / 50,
        "checkpoint": 250_000 * 14 / 2e10 / 20,
    }
    assert min(expected.values()) > 0
    assert step.parts == pytest.approx(expected, rel=1e-12)
    assert step.seconds == pytest.approx(sum(expected.values()))
    assert step.tokens == 2400 and step.tokens_per_s == pytest.approx(2400 / step.seconds)
    assert step.flops == 2400 * (3 * 3e6 + 1e7)
    assert step.mfu == pytest.approx(step.flops / step.seconds / 4e12)


def test_passes_of_the_teacher() -> None:
    """3 micro-batches in passes of 1, of 3, or of more than there are."""
    for size, passes in ((1, (1, 1, 1)), (3, (3,)), (9, (3,))):
        parts = simulated(config_of(teacher={"micro_batches_per_pass": size})).parts
        compute = [one * 200 * (1e7 / 5e11 + 8 * SMALL_S) for one in passes]
        waits = sum(waits_s(seconds, 3.6e6, 8) + gather_s(4e5, 1) for seconds in compute)
        assert parts["teacher: compute"] == pytest.approx(sum(compute))
        assert parts["teacher: communication not hidden"] == pytest.approx(waits, rel=1e-12)
    # In 8 bits an element of bf16 holds two weights of a matrix: 1.6 of 3.6 million are gathered as 0.8.
    shape = replace(TEACHER.shape, tensors=(400_000, 2_000_000, 1_600_000), matrices=(Matrix(0, (1000, 1600)),))
    # The student's stay as they are.
    student = replace(
        STUDENT, shape=replace(STUDENT.shape, tensors=(100_000, 900_000), matrices=(Matrix(0, (900, 1000)),))
    )
    small = Models(student, replace(TEACHER, shape=shape), 1000)
    plain = simulated(config_of()).parts["student: communication not hidden"]
    parts = simulated(config_of(teacher={"micro_batches_per_pass": 3, "quantize": "int8"}), small).parts
    assert parts["student: communication not hidden"] == plain
    # Each of 3 micro-batches converts 1.6 million weights, reading 1 byte and writing 2; 1,000 results are scaled.
    compute_s = 600 * (1e7 / 5e11 + 8 * SMALL_S + 1000 * 4 / 0.8e12) + 3 * 1.6e6 * 3 / 0.8e12
    assert parts["teacher: compute"] == pytest.approx(compute_s, rel=1e-12)
    waits = waits_s(compute_s, 2.8e6, 8) + gather_s(4e5, 1)
    assert parts["teacher: communication not hidden"] == pytest.approx(waits, rel=1e-12)


def test_a_teacher_in_8_bits() -> None:
    """Of 1e7 FLOPs a token, 2 x 1.6e6 are at the format's rate; 2,000 inputs are rounded, 800 results scaled."""
    matrices = Matrix(0, (800, 2000)), Matrix(1, (400, 400)), Matrix(2, (40, 1000, 10), expert=True)
    shape = replace(TEACHER.shape, tensors=(1_840_000, 1_600_000, 160_000, 400_000), matrices=matrices)
    models = Models(STUDENT, replace(TEACHER, shape=shape), 1000)
    peaks = {"fp8_peak_flop_per_s": 3e12, "int8_peak_flop_per_s": 2e12}
    cluster = replace(CLUSTER, gpu=GPU.model_copy(update=peaks))

    def compute_s(**section: Any) -> float:
        config = config_of(teacher={"quantize_skip_layers": (1,), **section})
        options: Any = {"domains": 3, "storage_bytes_per_s": 1e9}
        return simulate_step(config, models, cluster, **options).parts["teacher: compute"]

    experts = 3 * 400_000 * 7 / 0.8e12  # converted back for each micro-batch, and scaled
    for form, peak, compiled, of_input, of_result in (
        ("fp8", 3e12, False, 13, 0),
        ("fp8", 3e12, True, 5, 0),
        ("int8_dynamic", 2e12, False, 29, 24),
        ("int8_dynamic", 2e12, True, 5, 8),
    ):
        token = (1e7 - 3.2e6) / 0.5e12 + 3.2e6 / (0.5 * peak) + (of_input * 2000 + of_result * 800) / 0.8e12
        token += 0.0 if compiled else 8 * SMALL_S
        found = compute_s(quantize=form, compile_layers=compiled)
        assert found == pytest.approx(600 * token + experts, rel=1e-12), (form, compiled)
    weights = 3 * 1.6e6 * 3 / 0.8e12
    token = 1e7 / 0.5e12 + 8 * SMALL_S + 4 * 800 / 0.8e12
    assert compute_s(quantize="int8") == pytest.approx(600 * token + weights + experts, rel=1e-12)
    for form, what in ("fp8", "fp8"), ("int8_dynamic", "int8"):
        with pytest.raises(ConfigError, match=f"round has no {what} products .*says {what}_peak_flop_per_s"):
            simulated(config_of(teacher={"quantize": form}), models)
    only_read = {"quantize": "fp8", "cache": TeacherCache(path="c", mode="read_only")}
    assert "teacher: compute" not in simulated(config_of(teacher=only_read), models).parts


def test_a_measurement_is_forward_passes_of_the_student() -> None:
    """Nothing but its computation and the first gather, where the host has no part: 6 passes in 50 steps."""
    options: Any = {"domains": 3, "storage_bytes_per_s": 1e9, "host_s_per_layer": 0.0}
    compute = 200 * (3e6 / 5e11 + 4 * SMALL_S)
    assert compute > gather_s(1e6, 6)
    found = simulate_step(config_of(), MODELS, CLUSTER, **options).parts["controller"]
    assert found == pytest.approx(6 * (gather_s(250_000, 1) + compute) / 50, rel=1e-12)
    # 4 samples of each domain, one a rank: shorter passes of one sample, whose gathers show.
    config = config_of(data={"validation_samples": 4})
    found = simulate_step(config, MODELS, CLUSTER, **options).parts["controller"]
    assert found == pytest.approx(3 * (gather_s(250_000, 1) + gather_s(1e6, 6)) / 50, rel=1e-12)


def test_what_options_change_in_a_step() -> None:
    plain = simulated(config_of()).parts
    # The layers' products and small kernels once more in the backward pass, without the head's 2 x 100,000.
    small_s = 200 * 4 * SMALL_S
    again = simulated(config_of(student={"gradient_checkpointing": True})).parts
    assert again["student: compute"] - plain["student: compute"] == pytest.approx(
        3 * (200 * (3e6 - 2e5) / 5e11 + small_s)
    )
    # Every recomputed layer passes its hooks once more, "selective" too, which computes no product again.
    selective = simulated(config_of(student={"gradient_checkpointing": "selective"})).parts
    assert selective["student: compute"] == pytest.approx(plain["student: compute"] + 3 * small_s)
    backward_s, reduced_s = 200 * 6e6 / 5e11 + 2.7 * small_s, reduce_s(1e6, 6)
    more = hooks_s(max(backward_s + small_s, reduced_s), 4, 2) - hooks_s(max(backward_s, reduced_s), 4)
    name = "host's hooks not hidden"
    assert selective[name] - plain[name] == pytest.approx(3 * more)
    # 3 micro-batches of 200 tokens: the inputs of 4 layers go over PCIe twice, in bf16.
    away = simulated(config_of(student={"gradient_checkpointing": True, "offload_activations": "cpu"})).parts
    name = "student: layers' inputs to the host and back"
    assert away.pop(name) == pytest.approx(3 * 2 * 200 * 4 * 100 * 2 / 2e10)
    assert away == again
    # Gradients go to the host in float32, weights come back in bf16.
    offloaded = simulated(config_of(optimizer={"offload": "cpu"})).parts
    assert offloaded["optimizer"] - plain["optimizer"] == pytest.approx(250_000 * (4 + 2) / 2e10)
    waiting = simulated(config_of(checkpoint={"in_background": False})).parts
    assert waiting["checkpoint"] == pytest.approx(1_000_000 * 14 / 1e9 / 20)
    fp32 = simulated(config_of(train={"precision": "fp32"})).parts
    assert fp32["checkpoint"] == pytest.approx(250_000 * 16 / 2e10 / 20)
    # A student that is not trained, with filters that the plan leaves out, has neither a backward pass nor an update.
    frozen = simulated(config_of().model_copy(update={"method": "ted_filters"})).parts
    assert frozen["student: compute"] == pytest.approx(3 * (200 * 3e6 / 5e11 + small_s)) and frozen["optimizer"] == 0.0
    # Compiled layers have no small kernels of their own.
    fused = simulated(config_of(student={"compile_layers": True})).parts
    assert fused["student: compute"] == pytest.approx(3 * 200 * 9e6 / 5e11)
    assert fused["teacher: compute"] == plain["teacher: compute"]
    # One model's logits where no teacher runs: 9 bytes each.
    alone = simulated(config_of(loss={"gamma": 0.0})).parts
    assert alone["loss: row kernel"] == pytest.approx(3 * 200 * 1000 * 9 / 8e11)
    assert not any(part.startswith("teacher") for part in alone)


def test_layers_gathered_as_wholes_have_48_percent_of_the_hooks() -> None:
    """Of a part that nothing hides: links and matmuls are endless here."""
    endless = dict.fromkeys(("nvlink_bytes_per_s", "network_bytes_per_s", "peak_flop_per_s", "hbm_bytes_per_s"), 1e30)
    cluster = Cluster(GPU.model_copy(update=endless), 1, 1)
    config = config_of(train={"global_batch_samples": 6})
    name = "host's hooks not hidden"
    # Two passes of the teacher's 8 layers; a forward and a backward pass of the student's 4 for each micro-batch.
    for student, teacher in ((False, False), (True, False), (False, True)):
        sections = {"student": {"whole_layers": student}, "teacher": {"whole_layers": teacher}}
        hooks = 2 * 8 * (0.48 if teacher else 1) + 3 * 2 * 4 * (0.48 if student else 1)
        assert simulated(changed(config, **sections), cluster=cluster).parts[name] == pytest.approx(hooks * HOST_S)
    # Within a GPU each of the three micro-batches has a pass, without hooks.
    resident = changed(config, teacher={"shard_within": "gpu"}, student={"whole_layers": True})
    hooks = 3 * 8 * 0.23 + 3 * 2 * 4 * 0.48
    assert simulated(resident, cluster=cluster).parts[name] == pytest.approx(hooks * HOST_S)
    # Compiled layers leave 0.6 of the host's time, and a CUDA graph nothing. The next step's first layer is waited for.
    compiled = {"student": {"whole_layers": True, "compile_layers": True}, "teacher": {"compile_layers": True}}
    waits = "waits: reductions, and the host begins anew"
    for within, teacher, of_layer in (("node", 2 * 8 * 0.48 * 0.6, 0.48 * 0.6), ("gpu", 0.0, 0.0)):
        found = simulated(
            changed(config, student=compiled["student"], teacher={**compiled["teacher"], "shard_within": within}),
            cluster=cluster,
        ).parts
        assert found[name] == pytest.approx((teacher + 3 * 2 * 4 * 0.48 * 0.6) * HOST_S)
        assert found[waits] == pytest.approx(of_layer * HOST_S)


def test_a_backward_pass_gathers_again_what_a_billion_elements_do_not_hold() -> None:
    """The last half of a billion elements is used again before another billion has been; gradients are all reduced."""
    large = Models(model(2_000_000_000, 100_000, 4, 3e6), None, 1000)
    config = config_of(train={"global_batch_samples": 8}).model_copy(update={"teacher": None, "method": "cpt"})
    parts = simulated(config, large).parts
    compute, again = 200 * (3e6 / 5e11 + 4 * SMALL_S), 200 * (6e6 / 5e11 + 2.7 * 4 * SMALL_S)
    backward = gather_s(1.5e9, 4) + reduce_s(2e9, 6) - again
    expected = waits_s(compute, 2e9, 4) + backward
    assert parts["student: communication not hidden"] == pytest.approx(expected, rel=1e-12)
    rounded = simulated(changed(config, train={"reduce_dtype": "bfloat16"}), large).parts
    expected += gather_s(2e9, 6) - reduce_s(2e9, 6)
    assert rounded["student: communication not hidden"] == pytest.approx(expected, rel=1e-12)
    exactly = Models(model(500_000_000, 100_000, 4, 3e6), None, 1000)
    parts = simulated(config, exactly).parts
    expected = waits_s(compute, 5e8, 4) + reduce_s(5e8, 6) - again
    assert parts["student: communication not hidden"] == pytest.approx(expected, rel=1e-12)


def test_gathers_in_pieces_have_the_latency_of_each() -> None:
    """1,000,000 elements in pieces of 150,000 are 7 calls; 4 layers are at least 6. No computation hides them here."""
    waiting = replace(CLUSTER, gpu=GPU.model_copy(update={"peak_flop_per_s": 1e30}))
    latency = 8.4e-6 + 2 * 3.4e-6 + 2 * 14e-6
    name = "student: communication not hidden"
    plain = simulated(config_of(), cluster=waiting).parts[name]
    for bucket, calls in ((150_000, 7), (250_001, 6), (10_000_000, 6)):
        config = config_of().model_copy(
            update={"deepspeed": {"zero_optimization": {"stage3_prefetch_bucket_size": bucket}}}
        )
        first = max(1, ceil(250_000 / bucket)) - 1
        # 3 forward and 3 backward passes; only the forward pass waits for a first gather, of 250,000 elements.
        more = 3 * 2 * (calls - 6) * latency + 3 * first * latency
        assert simulated(config, cluster=waiting).parts[name] - plain == pytest.approx(more)


def test_two_gpus_of_a_node_have_no_network_between_them() -> None:
    assert collective_s(8e9, 3, Cluster(GPU, 1, 2)) == pytest.approx(8e9 / 2 / 8e9 + 3 * (8.4e-6 + 3.4e-6))
    # A fast network leaves NVLink as the slower of both.
    fast = GPU.model_copy(update={"network_bytes_per_s": 1e12})
    assert collective_s(8e9, 0, Cluster(fast, 2, 2)) == pytest.approx(8e9 * 3 / 4 / 8e9)
    assert collective_s(8e9, 2, Cluster(fast, 2, 1)) == pytest.approx(8e9 / 2 / 0.8e12 + 2 * (8.4e-6 + 28e-6))


DATA = PlannedData(
    domains=3, vocab_size=1000, token_bytes=4, shard_bytes=10**9, steps=120, intervals=3, source="by hand"
)
SPEED = Speed(mfu=0.25, storage_bytes_per_s=1e9)


def planned(config: Config, speed: Speed = SPEED, data: PlannedData = DATA) -> Plan:
    return make_plan(config, MODELS, data, CLUSTER, speed)


def test_the_figures_of_a_plan() -> None:
    plan = planned(config_of())
    per_token = 3 * 3e6 + 1e7
    assert plan.tokens == 120 * 24 * 100
    assert plan.tokens_per_s == pytest.approx(0.25 * 4e12 / per_token)
    assert plan.read_bytes_per_s == pytest.approx(4 * plan.tokens_per_s)
    assert plan.flop_per_s == 1e12
    saved = plan.checkpoints
    assert (saved.num_bytes, saved.kept_bytes, saved.export_bytes) == (14_000_000, 84_000_000, 2_000_000)
    assert saved.write_s == pytest.approx(14e6 / 1e9)
    assert saved.pause_s == pytest.approx(250_000 * 14 / 2e10)
    assert saved.apart_s == pytest.approx(20 * 2400 * per_token / 1e12)
    # 4 measurements of the student on 3 x 10 samples and one of the teacher; 6 checkpoints, for which training waits.
    measured = 3 * 10 * 100 * (4 * 3e6 + 1e7)
    training = plan.tokens * per_token
    assert plan.hours == pytest.approx(((training + measured) / 1e12 + 6 * saved.pause_s) / 3600, rel=1e-12)
    assert plan.gpu_hours == pytest.approx(4 * plan.hours)
    assert plan.least_hours == pytest.approx(120 * plan.step.seconds / 3600, rel=1e-12)
    assert not plan.measured and plan.memory.fits and plan.advice == []


def test_a_plan_by_a_measured_speed() -> None:
    plan = planned(config_of(), Speed(mfu=None, tokens_per_s_per_gpu=5000.0))
    assert plan.measured and plan.mfu == pytest.approx(5000 * 1.9e7 / 1e12)
    assert plan.tokens_per_s == pytest.approx(20_000)
    # A ledger of conversations counts targets, here a quarter of the tokens.
    of_targets = planned(config_of(), Speed(mfu=None, tokens_per_s_per_gpu=1250.0), replace(DATA, target_share=0.25))
    assert (of_targets.tokens_per_s, of_targets.hours) == (pytest.approx(20_000), pytest.approx(plan.hours))
    assert any("5,000 tokens/s a GPU, as measured" in line for line in plan.assumptions)
    # 119 steps end before the sixth checkpoint.
    five = planned(config_of(), data=replace(DATA, steps=119))
    six = planned(config_of())
    step_s = 2400 * 1.9e7 / 1e12
    assert (six.hours - five.hours) * 3600 == pytest.approx(step_s + six.checkpoints.pause_s)


def test_what_a_plan_assumes_is_said_with_its_numbers() -> None:
    lines = "\n".join(planned(config_of()).assumptions)
    for text in (
        "GPU: 1 TFLOP/s dense bf16, 100 GB; one way, GB/s: HBM 1,000, NVLink 10, network 1, host 20",
        "10% of a device is left",
        "speed: MFU 25% of the peak",
        "controller: 3 domains x 10 samples; the student 4 times, the teacher once (by hand)",
        "matmuls at 50% of the peak, links at 80% and HBM at 80% of nominal, 8.8 ms of the host",
        "which compile_layers spares, with 40% of the host's time (measured on a CPU)",
        "estimated, no GPU has measured compiled layers",
        "disks: 4 bytes a token; checkpoints written at 1 GB/s in all, in the background",
    ):
        assert text in lines, text
    for absent in ("train.precision is fp32", "stop.discrepancy", "only this stage", "teacher.quantize"):
        assert absent not in lines
    lines = "\n".join(planned(config_of(teacher={"quantize": "int8"})).assumptions)
    assert "teacher.quantize is int8: its linear layers with kernels around them" in lines
    assert "estimated, not measured" in lines
    config = config_of(train={"precision": "fp32"}, stop={"discrepancy": 1.1}, checkpoint={"in_background": False})
    lines = "\n".join(planned(config).assumptions)
    for text in ("train.precision is fp32", "stop.discrepancy may end", "in all, while training waits"):
        assert text in lines, text


def test_a_plan_as_json() -> None:
    plan = planned(config_of())
    found = plan_json(plan)
    training = plan.tokens * 3 * 3e6
    assert found["flops"]["cpt"] == pytest.approx(training)
    assert found["flops"]["kd"] == pytest.approx(training + plan.tokens * 1e7)
    assert found["tflops"] == {name: pytest.approx(value / 1e12) for name, value in found["flops"].items()}
    assert found["parameters"] == {"student": 1_000_000, "teacher": 4_000_000}
    assert found["simulated_step"]["seconds"] == plan.step.seconds
    without = config_of().model_copy(update={"teacher": None, "method": "cpt"})
    alone = plan_json(make_plan(without, Models(STUDENT, None, 1000), DATA, CLUSTER, SPEED))
    assert alone["parameters"] == {"student": 1_000_000, "teacher": None}
    assert alone["tflops"] == {"cpt": pytest.approx(training / 1e12), "kd": None, "ddk": None}
