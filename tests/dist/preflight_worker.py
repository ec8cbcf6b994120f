"""Functions for every rank of test_preflight.py: faults planted on one rank, and the rows of a preflight."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ddk_ds.comm import watch_ranks
from ddk_ds.config import load_config
from ddk_ds.engine.memory_estimate import estimate_memory
from ddk_ds.engine.model_files import model_shape
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.student import load_student
from ddk_ds.engine.teacher import load_teacher
from ddk_ds.train.inputs import check_inputs
from ddk_ds.train.preflight import agreement, measure_collectives, preflight
from ddk_ds.train.preflight import checks as in_order

_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS


def planted(runtime: Runtime, config_path: str, faults: list[str]) -> dict[str, list[dict[str, str]]]:
    """Return the rows of a preflight for each fault, which only rank 1 has; "none" is no fault, "lone" must be last."""
    agreement.SEEN_WITHIN_S = 2.0
    found = {}
    for fault in faults:
        patches = _plant(fault, config_path) if runtime.comm.rank == 1 else []
        overrides = ["seed=7"] if fault == "configuration" and runtime.comm.rank == 1 else []
        rows = preflight(load_config(config_path, overrides), runtime.comm, runtime.device)
        found[fault] = [asdict(row) for row in rows]
        for module, name, value in patches:
            setattr(module, name, value)
    found["collectives"] = [asdict(row) for row in measure_collectives(runtime.comm, runtime.device)]
    return found


def _plant(fault: str, config_path: str) -> list[tuple[Any, str, Any]]:
    """Make the fault; return the (module, name, value) to restore afterwards."""
    versions, now, shards = agreement.versions, agreement._now, in_order._shards
    if fault == "versions":
        agreement.versions = lambda: {**versions(), "torch": "2.0.1"}
    elif fault == "clock":
        agreement._now = lambda: time.time() + 100
    elif fault == "slightly off":
        agreement._now = lambda: time.time() - 5
    elif fault == "error":
        in_order._shards = lambda *_: 1 / 0  # type: ignore[assignment,return-value]
    elif fault == "lone":
        _cover(Path(load_config(config_path).output_dir))
    return [(agreement, "versions", versions), (agreement, "_now", now), (in_order, "_shards", shards)]


def _cover(directory: Path) -> None:
    """Mount another file system at `directory`, for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)


def slow_row(runtime: Runtime, config_path: str, limit_s: float) -> None:
    """Make a preflight in which rank 1 is slow to a row."""
    watch_ranks(45.0)
    agreement.COLLECTIVE_S = limit_s
    if runtime.comm.rank == 1:
        agreement.versions = lambda: time.sleep(600)  # type: ignore[assignment,return-value]
    preflight(load_config(config_path), runtime.comm, runtime.device)
    os._exit(9)  # not reached: the wait ends the process


def silent(runtime: Runtime, config_path: str, limit_s: float) -> None:
    """Measure collectives, to which rank 1 does not come."""
    watch_ranks(45.0)
    if runtime.comm.rank == 1:
        time.sleep(600)
    measure_collectives(runtime.comm, runtime.device, limit_s)
    os._exit(9)  # not reached: the wait ends the process


def measured_memory(runtime: Runtime, config_path: str) -> dict[str, dict[str, int]]:
    """Return the bytes of this rank's engines by part, measured and estimated."""
    config, comm = load_config(config_path), runtime.comm
    inputs = check_inputs(config, comm)
    assert inputs.teacher is not None
    vocab_size = inputs.tokenizer.vocab_size
    student = load_student(config, inputs.student, vocab_size, comm)
    teacher = load_teacher(config, inputs.teacher, vocab_size, comm)
    for last in (False, True):  # AdamW's moments come with its first step
        loss = student(torch.arange(64)[None], lambda hidden, head: (hidden @ head.weight.T).float().square().mean())
        student.backward(loss, last=last)
    student.update(1e-3, torch.zeros(0, dtype=torch.float64))
    optimizer = student.engine.optimizer
    parameters = list(student.engine.module.parameters())
    backbone = [*teacher.engine.module.parameters()]
    head = teacher.head._head.weight
    if all(head is not parameter for parameter in backbone):
        backbone.append(head)
    master = sum(t.numel() * t.element_size() for t in optimizer.fp32_partitioned_groups_flat)
    states = [t for state in optimizer.optimizer.state.values() for t in state.values() if t.numel() > 1]
    moments = sum(t.numel() * t.element_size() for t in states)
    gradients = optimizer.grad_partitions_flat_buffer
    [bucket] = [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
    measured = {
        "student shards": sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in parameters),
        "teacher shards": sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in backbone),
        "master weights and moments": master + moments,
        "gradient sums": gradients.numel() * gradients.element_size(),
        "gradient bucket": bucket.numel() * bucket.element_size(),
        "small parameters": sum(p.ds_numel * p.element_size() for p in parameters if p.ds_persist),
    }
    shapes = model_shape(inputs.student), model_shape(inputs.teacher)
    estimate = estimate_memory(config, *shapes, vocab_size, comm.world_size)
    return {"measured": measured, "estimated": {part: estimate.parts[part] for part in measured}}
