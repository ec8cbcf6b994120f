"""One rank of tools/bench/bench_step.py: a distillation step in one of several ways, timed.

RANK=0 WORLD_SIZE=1 ... python -m tools.bench.step_cases SPECIFICATION RESULT
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddk_ds.engine.model_files import read_model
from ddk_ds.engine.runtime import Runtime, max_peak_bytes, start_runtime, synchronize
from ddk_ds.engine.stage_clock import StageClock
from ddk_ds.engine.student import load_student
from ddk_ds.engine.teacher import load_teacher
from ddk_ds.kernels import Options
from ddk_ds.methods import make_method
from ddk_ds.train.step import train_step
from tools.bench.step_peers import Step, bare_passes, full_logits
from tools.bench.step_setting import Case, case_config

RATE = 1e-4


def run_case(case: Case, runtime: Runtime) -> dict[str, Any]:
    """Seconds of each timed step and of its parts, and the most memory that a rank has held."""
    batches = _batches(case, runtime)
    step = _make_step(case, runtime)
    seconds, parts = [], []
    for number in range(case.warm_up + case.steps):
        synchronize(runtime)
        started = time.perf_counter()
        found = step(batches)
        synchronize(runtime)
        if number >= case.warm_up:
            seconds.append(time.perf_counter() - started)
            parts.append(found)
    return {"steps_s": seconds, "parts_s": parts, "peak_bytes": max_peak_bytes(runtime)}


def _make_step(case: Case, runtime: Runtime) -> Step:
    if case.impl == "floor":
        return bare_passes(case_config(case), runtime.device)
    if case.impl == "full_logits":
        return full_logits(case_config(case), runtime.device, case.ranks)
    return _ours(case, runtime)


def _batches(case: Case, runtime: Runtime) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(runtime.comm.rank)
    shape = (case.accumulation, case.samples, case.length)
    return list(torch.randint(case.vocab_size, shape, generator=generator).to(runtime.device))


def _ours(case: Case, runtime: Runtime) -> Step:
    """The step of a run: the same engines, method and loss."""
    comm, clock = runtime.comm, StageClock(runtime.device.type)
    config = case_config(case)
    teacher = None
    if config.teacher is not None:
        files = read_model(Path(config.teacher.path), "teacher.path")
        teacher = load_teacher(config, files, case.vocab_size, comm, None, clock)
    student = load_student(
        config, read_model(Path(config.student.path), "student.path"), case.vocab_size, comm, None, clock
    )
    method = make_method(config, teacher, Options(case.vocab_size, gamma=0.0), 1, {})
    domain = torch.zeros(case.samples, dtype=torch.int64)

    def step(batches: Sequence[torch.Tensor]) -> dict[str, float]:
        metrics = train_step(
            student,
            method,
            [{"input_ids": ids, "domain": domain, "sample_id": domain} for ids in batches],
            learning_rate=RATE,
            progress=0.0,
            per_pass=config.per_pass,
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
    result = run_case(case, runtime)
    if runtime.comm.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
