"""A run's directory with all of its files, as three ranks leave it, made without training: for what only reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddk_ds.config import load_config
from ddk_ds.engine.model_files import read_model
from ddk_ds.engine.student import unloaded_student
from ddk_ds.engine.zero_shards import MODEL_FILE
from ddk_ds.files import partial_path
from ddk_ds.mixture.interval_state import IntervalState
from ddk_ds.train.checkpoint.checkpoint_files import FORMAT, TAG, Manifest, put_in_place
from ddk_ds.train.interval import interval_record
from ddk_ds.train.ledger import Ledger
from ddk_ds.train.run_dir import claim_run_dir, run_identity
from ddk_ds.train.run_end import make_summary, write_summary
from ddk_ds.train.state import RunState
from tests.dist.tiny import tiny_config

DOMAINS = ("code", "text")
RANKS = 3  # divides no size of the tests' models: slices are padded


def save_run(folder: Path, steps: Sequence[int] = (2, 4), **sections: Any) -> Path:
    """A run over the models folder/student and folder/teacher with checkpoints of these steps; returns its directory.

    The masters of step s are the student's own weights times s. Intervals have two steps.
    """
    config = tiny_config(folder, **sections)
    root = config.run_dir / "checkpoints"
    root.mkdir(parents=True)
    files = read_model(Path(config.student.path), "student.path")
    identity = run_identity(config, {"student": files.fingerprint})
    claim_run_dir(config, identity)
    ledger = Ledger(config.run_dir, rank=0)
    ledger.rewind(0)
    mixture = {"train_tokens": dict.fromkeys(DOMAINS, 1000), "schedule": None}
    ledger.event("start", world_size=RANKS, mixture=mixture, versions={"torch": "2.9"})
    ends = {}
    for step in range(max(steps) + 1):
        if step:
            ledger.write(_step(step))
        if step % 2 == 0:
            ledger.write(_interval(step))
        ends[step] = ledger.position()
    for step in steps:
        state = RunState(
            IntervalState.new([{"name": name, "num_samples": 9, "sha": ""} for name in DOMAINS], seed=0),
            step=step,
            domain_tokens=[1000 * step, 3000 * step],
            student_before=[40.0, 50.0],
        )
        length, digest = ends[step]
        manifest = Manifest(FORMAT, step, RANKS, length, identity, {"torch": "2.9"}, {}, ledger_xxh64=digest)
        partial = partial_path(root / f"step-{step:08d}")
        (partial / TAG).mkdir(parents=True)
        _write_shards(partial / TAG, Path(config.student.path), step, state)
        assert not put_in_place(partial, root / f"step-{step:08d}", manifest)
        ledger.event("checkpoint", step=step, path=str(root / f"step-{step:08d}"), pause_s=0.1, seconds=0.2)
    return config.run_dir


def end_run(run_dir: Path) -> None:
    """Give a run its end: the last line of its ledger, summary.json, and what happened last."""
    state = RunState(
        IntervalState.new([{"name": name, "num_samples": 9, "sha": ""} for name in DOMAINS], seed=0),
        step=4,
        domain_tokens=[4000, 12000],
        student_before=[40.0, 50.0],
    )
    after, teacher = np.array([36.0, 46.0]), np.array([20.0, 25.0])
    config = load_config(run_dir / "config.yaml")
    with (run_dir / "ledger.jsonl").open("a") as ledger:
        ledger.write(
            json.dumps(interval_record("end", state, list(DOMAINS), after, teacher, {"measure_s": 1.0})) + "\n"
        )
    write_summary(run_dir, make_summary(config, state, DOMAINS, after, teacher, "4 steps done"))
    Ledger(run_dir, rank=0).event("end", step=4, reason="4 steps done")


def _step(step: int) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": step,
        "interval": (step - 1) // 2,
        "loss": 3.5 / step,
        "ce": 3.0 / step,
        "kl": 0.5 / step,
        "grad_norm": 1.0,
        "domain_tokens": [1000, 3000],
        "learning_rate": 1e-3,
        "clock": {"step_s": 0.5, "data_s": 0.1, "tokens_per_s": 8000.0, "mfu": None, "peak_memory_gb": 1.5},
    }


def _interval(step: int) -> dict[str, Any]:
    def by_domain(*values: float) -> dict[str, float]:
        return dict(zip(DOMAINS, values, strict=True))

    return {
        "kind": "interval",
        "interval": step // 2,
        "step": step,
        "student_ppl": by_domain(40.0 - step, 50.0 - step),
        "teacher_ppl": by_domain(20.0, 25.0),
        "ratio": by_domain((40.0 - step) / 20, (50.0 - step) / 25),
        "smoothed_ppl": None,
        "proportions": by_domain(0.25 + step / 100, 0.75 - step / 100),
        "log_proportions": by_domain(math.log(0.25 + step / 100), math.log(0.75 - step / 100)),
        "asked": {"code": 4, "text": 12},
        "counts": {"code": 4, "text": 12},
        "owed": {"code": 0.0, "text": 0.0},
        "domain_tokens": {"code": 1000 * step, "text": 3000 * step},
        "ids_sha": "0" * 64,
        "alarms": [],
        "clock": {"measure_s": 1.0, "controller_s": 0.1},
    }


def _write_shards(directory: Path, student: Path, factor: float, state: RunState) -> None:
    files = read_model(student, "student.path")
    shapes, slices = {}, [[] for _ in range(RANKS)]  # type: ignore[var-annotated]
    stored, parameters = unloaded_student(files, trusted=False)
    for conversion in stored.parameters:
        [(own_name, content)] = conversion.to_model(files.read).items()
        name, tensor = parameters[own_name][0], content.float() * factor
        shapes[name] = tensor.shape
        length = math.ceil(tensor.numel() / RANKS)
        padded = torch.nn.functional.pad(tensor.flatten(), (0, RANKS * length - tensor.numel()))
        for rank, part in enumerate(padded.split(length)):
            slices[rank].append(part)
    torch.save({"param_shapes": [shapes], "run": state.to_json()}, directory / MODEL_FILE)
    for rank in range(RANKS):
        shard = {"fp32_flat_groups": [torch.cat(slices[rank])], "optimizer_state_dict": {}}
        path = directory / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": shard}, path)
