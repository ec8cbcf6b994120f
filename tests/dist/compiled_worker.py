"""Function that every rank of the tests of compiled layers runs: 50 steps, what they lose, compile and reserve.

tests/gpu/test_compiled_gpu.py judges what it returns on GPUs, by `faults`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ddk_ds.engine.compiling import CompileWatch
from ddk_ds.engine.model_files import read_model
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.student import load_student
from ddk_ds.engine.teacher import load_teacher
from ddk_ds.kernels import Options
from ddk_ds.methods import make_method
from ddk_ds.train.step import train_step
from tests.dist.tiny import VOCAB, save_model, tiny_config

MICRO_BATCHES, STEPS, INTERVAL = 2, 50, 10


def train(
    runtime: Runtime,
    folder: str,
    *,
    compiled: bool,
    within: str,
    precision: str,
    layers: int,
    hidden: int,
    length: int,
    steps: int = STEPS,
    interval: int = INTERVAL,
) -> dict[str, Any]:
    """Train `steps` steps; return their losses, what was compiled late, and the memory that was reserved.

    Late is after the first `interval` steps, in words of the run's own warning. Reserved are the most bytes that the
    allocator held after them, on this rank; 0 on a CPU.
    """
    root, comm, on_gpu = Path(folder), runtime.comm, runtime.device.type == "cuda"
    if comm.rank == 0:
        for seed, name in enumerate(("student", "teacher")):
            shape = {"num_hidden_layers": layers, "intermediate_size": 4 * hidden}
            save_model(root / name, hidden=hidden, vocab=VOCAB, tied=False, seed=seed, **shape)
    comm.barrier()
    sections = {
        "train": {"global_batch_samples": MICRO_BATCHES * comm.world_size, "precision": precision},
        "student": {"compile_layers": compiled},
        "teacher": {"compile_layers": compiled, "shard_within": within},
    }
    config = tiny_config(root, method="kd", deepspeed={"zero_optimization": {}}, **sections)
    files, teacher_files = (read_model(root / name, name) for name in ("student", "teacher"))
    teacher = load_teacher(config, teacher_files, VOCAB, comm)
    student = load_student(config, files, VOCAB, comm)
    method = make_method(config, teacher, Options(VOCAB, gamma=0.2), 1, {})
    watch, losses = CompileWatch(), []
    none: Any = dict.fromkeys(("domain", "sample_id"), torch.zeros(1, dtype=torch.int64))
    for step in range(steps):
        if step == interval:
            watch.news()
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        generator = torch.Generator().manual_seed(step * comm.world_size + comm.rank)
        ids = torch.randint(0, VOCAB, (MICRO_BATCHES, 1, length), generator=generator)
        batches: Any = [{"input_ids": one, **none} for one in ids]
        rates: dict[str, Any] = {"learning_rate": 1e-3, "progress": step / steps, "num_domains": 1}
        losses.append(train_step(student, method, batches, **rates, device=runtime.device, comm=comm).loss)
    reserved = torch.cuda.max_memory_reserved() if on_gpu else 0
    return {"losses": losses, "late": watch.news(), "reserved": reserved}


def faults(plain: dict[str, Any], compiled: dict[str, Any], rounding: float, memory: float = 1.02) -> list[str]:
    """Return what speaks against compiled layers as the default, of `train`'s results; nothing if nothing does.

    Losses may differ by the share `rounding` in any step, and the reserved memory may be `memory` times that of layers
    that are not compiled: its blocks are of whole MB.
    """
    found = []
    pairs = enumerate(zip(plain["losses"], compiled["losses"], strict=True), 1)
    for step, (ours, theirs) in pairs:
        if not (math.isfinite(theirs) and abs(ours - theirs) <= rounding * abs(ours)):
            found.append(f"step {step} has a loss of {theirs}, and of {ours} without compiling")
            break
    if plain["losses"] == compiled["losses"]:
        found.append("not a digit of a loss differs: nothing was compiled")
    if compiled["late"]:
        found.append(compiled["late"])
    if compiled["reserved"] > memory * plain["reserved"]:
        found.append(f"{compiled['reserved']:,} bytes are reserved, {plain['reserved']:,} without compiling")
    return found
