"""Function that every rank of the first hour's tests runs: what a step and a teacher's pass do to their device.

tests/gpu/test_first_hour_gpu.py judges the numbers on GPUs; tests/dist/test_first_hour.py runs the same on a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ddk_ds.engine.model_files import model_shape, read_model
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.student import load_student
from ddk_ds.engine.teacher import Teacher, load_teacher
from ddk_ds.kernels import Options
from ddk_ds.methods import make_method
from ddk_ds.train.step import train_step
from tests.dist.collectives_worker import Collectives
from tests.dist.tiny import VOCAB, save_model, tiny_config

MICRO_BATCHES, STEPS = 2, 4
_SYNCHRONISING = "called a synchronizing CUDA operation"


def measure(runtime: Runtime, folder: str, layers: int, hidden: int, length: int) -> dict[str, Any]:
    """Return what the three functions below return, and the bytes of one of the models' `layers` layers."""
    root, comm = Path(folder), runtime.comm
    if comm.rank == 0:
        for seed, name in enumerate(("student", "teacher")):
            shape = {"num_hidden_layers": layers, "intermediate_size": 4 * hidden}
            save_model(root / name, hidden=hidden, vocab=VOCAB, tied=False, seed=seed, **shape)
    comm.barrier()
    train = {"global_batch_samples": MICRO_BATCHES * comm.world_size, "precision": "bf16"}
    config = tiny_config(root, method="kd", train=train, deepspeed={"zero_optimization": {}})
    files, teacher_files = (read_model(root / name, name) for name in ("student", "teacher"))
    teacher = load_teacher(config, teacher_files, VOCAB, comm)
    student = load_student(config, files, VOCAB, comm)
    method = make_method(config, teacher, Options(VOCAB, gamma=0.2), 1, {})

    def step(number: int) -> None:
        ids = torch.full((1, length), number + comm.rank)
        batch: Any = {"input_ids": ids, **dict.fromkeys(("domain", "sample_id"), torch.zeros(1, dtype=torch.int64))}
        rates: dict[str, Any] = {"learning_rate": 1e-3, "progress": 0.0, "num_domains": 1}
        train_step(student, method, [batch] * MICRO_BATCHES, **rates, device=runtime.device, comm=comm)

    return {
        "layer_bytes": 2 * model_shape(teacher_files).largest_layer,
        "teacher_pass": memory_of(lambda: _pass(teacher, runtime.device, length), runtime.device),
        "step": calls_of(step, runtime.device),
        "reduction": reduction_errors(runtime),
    }


def _pass(teacher: Teacher, device: torch.device, length: int) -> None:
    with torch.no_grad():
        teacher.hidden([torch.zeros(1, length, dtype=torch.int64, device=device)])


def memory_of(work: Callable[[], None], device: torch.device) -> dict[str, int]:
    """Return the peaks of a GPU's memory in `work`, which runs once before, in bytes, and the allocator's retries.

    Allocated is what tensors hold, active also what was freed before the GPU had passed its last use, reserved all that
    the allocator has taken. On a CPU all are 0.
    """
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    work()
    stats = torch.cuda.memory_stats() if device.type == "cuda" else {}
    peaks = {name: int(stats.get(f"{name}_bytes.all.peak", 0)) for name in ("allocated", "active", "reserved")}
    return peaks | {"retries": int(stats.get("num_alloc_retries", 0))}


def calls_of(step: Callable[[int], None], device: torch.device) -> dict[str, Any]:
    """Return the collectives of the last of STEPS steps by kind and dtype, and the calls that waited for the GPU."""
    for number in range(STEPS - 1):  # ZeRO-3 records its trace
        step(number)
    with Collectives() as collectives, synchronising_calls(device) as places:
        step(STEPS - 1)
    return {"collectives": dict(collectives.counted), "waits": places}


@contextmanager
def synchronising_calls(device: torch.device) -> Iterator[list[str]]:
    """Collect file and line of the calls in the block for which the host waited; none on a CPU."""
    places: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    places += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if _SYNCHRONISING in str(w.message)]


def reduction_errors(runtime: Runtime) -> dict[str, float]:
    """Return the relative errors of a sum of bf16 gradients over ranks, added in bfloat16 and in float32."""
    gradients = []
    for rank in range(runtime.comm.world_size):
        generator = torch.Generator().manual_seed(rank)
        gradients.append(torch.randn(1 << 20, generator=generator).bfloat16())
    truth = torch.stack([gradient.double() for gradient in gradients]).sum(0)
    errors = {}
    for dtype in (torch.bfloat16, torch.float32):
        total = gradients[runtime.comm.rank].to(runtime.device, dtype)
        torch.distributed.all_reduce(total)
        errors[str(dtype).removeprefix("torch.")] = ((total.double().cpu() - truth).norm() / truth.norm()).item()
    return errors
