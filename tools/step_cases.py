"""One rank of tools/bench_step.py: a distillation step in one of several ways, timed.

RANK=0 WORLD_SIZE=1 ... python tools/step_cases.py SPECIFICATION RESULT
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the project is not installed

from ddk_ds.config import Config, make_config
from ddk_ds.engine.model_files import read_model
from ddk_ds.engine.models import load_student
from ddk_ds.engine.peers import Step, bare_passes, full_logits, save_random
from ddk_ds.engine.runtime import Runtime, peak_memory, start_runtime
from ddk_ds.engine.stage_clock import StageClock
from ddk_ds.engine.teacher import load_teacher
from ddk_ds.kernels import default_chunk_tokens
from ddk_ds.methods import HeadOptions, make_method
from ddk_ds.train.step import train_step

GAMMA, RATE, WARM_UP = 0.2, 1e-4, 2


@dataclass(frozen=True)
class Case:
    """What one process group measures."""

    implementation: str
    """ddk, kd or cpt: this project's; floor: bare passes of both models; full_logits: engines as one writes them."""
    folder: str
    """Holds the models: teacher/ and student/."""
    micro_batches: int
    """Of one step on one rank."""
    samples: int
    """Of one micro-batch."""
    length: int
    vocab_size: int
    precision: str
    steps: int


def run_case(case: Case, runtime: Runtime) -> dict[str, Any]:
    """Median seconds of a step, its tokens over all ranks, its parts, and the most memory a rank has held."""
    batches = _batches(case, runtime)
    step = _make_step(case, runtime)
    seconds, parts = [], []
    for number in range(WARM_UP + case.steps):
        _wait(runtime)
        started = time.perf_counter()
        found = step(batches)
        _wait(runtime)
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - started)
            parts.append(found)
    peak = torch.tensor(float(peak_memory(runtime.device)), device=runtime.device)
    return {
        "step_s": statistics.median(seconds),
        "spread_s": max(seconds) - min(seconds),
        "tokens": case.micro_batches * case.samples * case.length * runtime.comm.world_size,
        "parts_s": {name: statistics.median(found[name] for found in parts) for name in parts[0]},
        "peak_bytes": int(runtime.comm.all_reduce_max(peak)),
    }


def _make_step(case: Case, runtime: Runtime) -> Step:
    world_size = runtime.comm.world_size
    if case.implementation == "floor":
        return bare_passes(_config(case, world_size, "kd"), runtime.device)
    if case.implementation == "full_logits":
        return full_logits(_config(case, world_size, "kd"), runtime.device, world_size)
    return _ours(case, runtime)


def _wait(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    runtime.comm.barrier()


def _batches(case: Case, runtime: Runtime) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(runtime.comm.rank)
    shape = (case.micro_batches, case.samples, case.length)
    return list(torch.randint(case.vocab_size, shape, generator=generator).to(runtime.device))


def _config(case: Case, world_size: int, method: str) -> Config:
    root = Path(case.folder)
    samples = case.micro_batches * case.samples
    values: dict[str, Any] = {
        "name": "bench",
        "method": method,
        "student": {"path": str(root / "student")},
        "teacher": {"path": str(root / "teacher")},
        "data": {"path": "none", "sequence_length": case.length},
        "loss": {"gamma": GAMMA},
        "optimizer": {"warmup_steps": 1},
        "train": {
            "global_batch_samples": samples * world_size,
            "micro_batch_samples": case.samples,
            "precision": case.precision,
        },
        "stop": {"steps": 1000},
    }
    if method == "cpt":
        del values["teacher"]
    return make_config(values, "bench_step")


def _ours(case: Case, runtime: Runtime) -> Step:
    """The step of a run: the same engines, method and loss."""
    comm, clock = runtime.comm, StageClock(runtime.device.type)
    config = _config(case, comm.world_size, case.implementation)
    teacher = None
    if config.teacher is not None:
        files = read_model(Path(config.teacher.path), "teacher.path")
        teacher = load_teacher(config, files, case.vocab_size, comm, None, clock)
    student = load_student(
        config, read_model(Path(config.student.path), "student.path"), case.vocab_size, comm, None, clock
    )
    options = HeadOptions(case.vocab_size, default_chunk_tokens(case.vocab_size, runtime.device.type))
    method = make_method(config, teacher, options, 1, {})
    domain = torch.zeros(case.samples, dtype=torch.int64)

    def step(batches: Sequence[torch.Tensor]) -> dict[str, float]:
        metrics = train_step(
            student,
            method,
            [{"input_ids": ids, "domain": domain, "sample_id": domain} for ids in batches],
            learning_rate=RATE,
            progress=0.0,
            num_domains=1,
            device=runtime.device,
            comm=comm,
        )
        return metrics.seconds

    return step


def main() -> None:
    """Run the case of the environment's rank; rank 0 writes the result."""
    case = Case(**json.loads(sys.argv[1]))
    runtime = start_runtime()
    if runtime.comm.rank == 0:
        for name in ("teacher", "student"):
            save_random(Path(case.folder) / name, case.precision, runtime.device)
    runtime.comm.barrier()
    result = run_case(case, runtime)
    if runtime.comm.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps({**asdict(case), **result}))


if __name__ == "__main__":
    main()
