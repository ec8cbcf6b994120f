"""The peers of the step in tools/bench/bench_step.py: bare models, and engines as one writes them by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from ddk_ds.config import Config
from ddk_ds.engine.ds_config import student_ds_config, teacher_ds_config
from ddk_ds.engine.stage_clock import StageClock
from ddk_ds.engine.student import DTYPES

Step = Callable[[Sequence[torch.Tensor]], dict[str, float]]


def bare_passes(config: Config, device: torch.device) -> Step:
    """Each model by itself: the teacher's forward, the student's forward, cross-entropy and backward, AdamW.

    No engine, no divergence: a distillation step does all of this and more. The step takes micro-batches (B, L) and
    returns the seconds of its parts.
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
    """Two ZeRO-3 engines around whole models, all logits of a micro-batch of both, torch's own losses."""
    teacher, student = _models(config, device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.optimizer.learning_rate)
    trained, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=student_ds_config(config, world_size))
    frozen, *_ = deepspeed.initialize(model=teacher, config=teacher_ds_config(config))
    frozen.eval()
    gamma = config.loss.gamma

    def step(batches: Sequence[torch.Tensor]) -> dict[str, float]:
        for ids in batches:
            with torch.no_grad():
                theirs = frozen(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            ours = trained(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            kl = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
            trained.backward(F.cross_entropy(ours, ids[:, 1:].flatten()) + gamma * kl)
            trained.step()
        return {}

    return step


def _models(config: Config, device: torch.device) -> tuple[Any, Any]:
    """Teacher, frozen, and student."""
    assert config.teacher is not None, "both models are measured"
    dtype = DTYPES[config.train.precision]
    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for path in (config.teacher.path, config.student.path)
    ]
    teacher, student = (model.to(device) for model in models)
    return teacher.requires_grad_(False).eval(), student.train()
