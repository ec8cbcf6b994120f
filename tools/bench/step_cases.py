"""One rank of tools/bench/bench_step.py: it times the distillation step of one implementation.

RANK=0 WORLD_SIZE=1 ... python -m tools.bench.step_cases SPECIFICATION RESULT
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from ddk_ds.config import Config
from ddk_ds.data.loader import document_positions
from ddk_ds.engine.ds_config import student_ds_config, teacher_ds_config
from ddk_ds.engine.model_files import DTYPES, read_model
from ddk_ds.engine.runtime import Runtime, memory_figures, start_runtime, synchronize
from ddk_ds.engine.stage_clock import StageClock
from ddk_ds.engine.student import load_student
from ddk_ds.engine.teacher import load_teacher
from ddk_ds.methods import make_method
from ddk_ds.train.step import train_step
from ddk_ds.train.teacher_store import head_options
from tools.bench.step_setting import DOCUMENTS, Case, case_config

RATE = 1e-4
Step = Callable[[Sequence[torch.Tensor]], dict[str, float]]
"""A function that makes one step on micro-batches (B, L) and returns the seconds of its parts."""


def main() -> None:
    """Run the case as the rank that the environment names; rank 0 writes the result."""
    case = Case(**json.loads(sys.argv[1]))
    runtime = start_runtime()
    result = run_case(case, runtime)
    if runtime.comm.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(result))


def run_case(case: Case, runtime: Runtime) -> dict[str, Any]:
    """Return the seconds of each timed step and of its parts, and the largest peak memory of a rank."""
    batches = _batches(case, runtime)
    step = _make_step(case, runtime)
    seconds, parts = [], []
    for number in range(case.warm_up + case.steps):
        synchronize(runtime)
        started = time.perf_counter()
        part_seconds = step(batches)
        synchronize(runtime)
        if number >= case.warm_up:
            seconds.append(time.perf_counter() - started)
            parts.append(part_seconds)
    return {"steps_s": seconds, "parts_s": parts, **memory_figures(runtime)}


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


def sample_positions(case: Case) -> torch.Tensor | None:
    """Return positions (B, L) of tokens in DOCUMENTS documents a sample, whose borders are random."""
    generator = np.random.default_rng(0)
    borders = [np.sort(generator.choice(case.length - 1, DOCUMENTS - 1, replace=False)) for _ in range(case.samples)]
    return document_positions([np.diff(each + 1, prepend=0, append=case.length) for each in borders])


def _ours(case: Case, runtime: Runtime) -> Step:
    """Return the step of a real run: its engines, method and loss."""
    comm, clock = runtime.comm, StageClock(runtime.device.type)
    config = case_config(case)
    teacher = None
    if config.teacher is not None:
        files = read_model(Path(config.teacher.path), "teacher.path")
        teacher = load_teacher(config, files, case.vocab_size, comm, None, clock)
    student = load_student(
        config, read_model(Path(config.student.path), "student.path"), case.vocab_size, comm, None, clock
    )
    method = make_method(config, teacher, head_options(config, case.vocab_size, runtime.device.type), 1, {})
    domain = torch.zeros(case.samples, dtype=torch.int64)
    positions = sample_positions(case) if config.data.documents == "masked" else None

    def step(batches: Sequence[torch.Tensor]) -> dict[str, float]:
        metrics = train_step(
            student,
            method,
            [{"input_ids": ids, "domain": domain, "sample_id": domain, "positions": positions} for ids in batches],
            learning_rate=RATE,
            progress=0.0,
            teacher_pass_size=config.teacher_pass_size,
            num_domains=1,
            device=runtime.device,
            comm=comm,
        )
        return metrics.seconds

    return step


def bare_passes(config: Config, device: torch.device) -> Step:
    """Return a step of bare models: the teacher's forward, the student's forward, cross-entropy, backward and AdamW.

    It has no engine and no divergence, so every distillation step does at least this much.
    """
    teacher, student = _models(config, device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.optimizer.learning_rate)

    clock = StageClock(device.type)

    def step(batches: Sequence[torch.Tensor]) -> dict[str, float]:
        with clock.stage("teacher"), torch.inference_mode():
            for ids in batches:
                teacher(ids, use_cache=False)
        with clock.stage("student"):
            for ids in batches:
                (student(ids, labels=ids, use_cache=False).loss / len(batches)).backward()
        with clock.stage("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock.take_seconds()

    return step


def full_logits(config: Config, device: torch.device, world_size: int) -> Step:
    """Return the step of a plain loop: two ZeRO-3 engines, all logits of a micro-batch, and torch's losses."""
    teacher, student = _models(config, device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.optimizer.learning_rate)
    trained, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=student_ds_config(config, world_size))
    frozen, *_ = deepspeed.initialize(model=teacher, config=teacher_ds_config(config))
    frozen.eval()
    gamma = config.loss.gamma

    def step(batches: Sequence[torch.Tensor]) -> dict[str, float]:
        for ids in batches:
            with torch.no_grad():
                teacher_logits = frozen(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            logits = trained(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
            kl = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
            trained.backward(F.cross_entropy(logits, ids[:, 1:].flatten()) + gamma * kl)
            trained.step()
        return {}

    return step


def _models(config: Config, device: torch.device) -> tuple[Any, Any]:
    """Return the frozen teacher and the student on `device`."""
    assert config.teacher is not None, "both models are measured"
    dtype = DTYPES[config.train.precision]
    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for path in (config.teacher.path, config.student.path)
    ]
    teacher, student = (model.to(device) for model in models)
    return teacher.requires_grad_(False).eval(), student.train()


if __name__ == "__main__":
    main()
    # A thread of the process group that still runs aborts an orderly end now and then ("terminate called").
    os._exit(0)
