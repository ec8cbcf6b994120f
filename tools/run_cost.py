"""What a finished run has cost: tokens, time, and an estimate of its floating-point operations."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddk_ds.comm import SingleProcess
from ddk_ds.config import Config, load_config
from ddk_ds.engine.flops import model_flops, training_flops
from ddk_ds.engine.model_files import model_directory, read_model
from ddk_ds.errors import UserError
from ddk_ds.run_files import read_ledger, read_summary


@dataclass(frozen=True)
class RunCost:
    """Of one run."""

    tokens: int
    """Trained on: targets of the loss."""
    wall_s: float
    """Of steps and measurements."""
    evaluation_time_share: float
    """Of wall time in measurements (at the start, between intervals, at the end) and the controller's decisions."""
    flops: float | None
    """Training and evaluation; None where the models' files are gone."""
    evaluation_flops: float | None


def run_cost(run_dir: Path) -> RunCost:
    """Read a finished run's directory. Raises CheckpointError where it holds none."""
    summary, records = read_summary(run_dir), read_ledger(run_dir)
    config = load_config(run_dir / "config.yaml")
    measurements = [record for record in records if record["kind"] in ("interval", "end")]
    evaluation_s = _clock(measurements, "measure_s") + _clock(measurements, "controller_s")
    steps_s = _clock(records, "step_s")
    length = config.data.sequence_length
    training_tokens = summary["steps"] * config.train.global_batch_samples * length
    measured_tokens = len(summary["domains"]) * config.data.validation_samples * length
    try:
        student = forward_flops(run_dir / "export", length)
        teacher = _teacher_flops(config, length)
    except UserError:
        training = evaluation = None
    else:
        training = training_flops(config, student, teacher) * training_tokens
        evaluation = float((len(measurements) * student + teacher) * measured_tokens)
    return RunCost(
        tokens=summary["tokens"],
        wall_s=summary["wall_s"],
        evaluation_time_share=evaluation_s / max(evaluation_s + steps_s, 1e-9),
        flops=None if training is None or evaluation is None else training + evaluation,
        evaluation_flops=evaluation,
    )


def forward_flops(directory: Path, sequence_length: int) -> float:
    """Of one token's forward pass through the model in this directory. Raises ConfigError where it is not one."""
    return model_flops(read_model(directory, "model"), sequence_length)


def _teacher_flops(config: Config, length: int) -> float:
    if config.teacher is None:
        return 0.0
    return forward_flops(model_directory(config.teacher.path, "teacher.path", SingleProcess()), length)


def _clock(records: list[dict[str, Any]], key: str) -> float:
    return math.fsum(record["clock"].get(key, 0.0) for record in records)


def start_event(run_dir: Path) -> dict[str, Any]:
    """What the run's first start noted: number of ranks and versions."""
    with (run_dir / "events.jsonl").open() as stream:
        return dict(json.loads(stream.readline()))
