"""A run's directory with checkpoints as three ranks leave them, made without training: for what only reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ddk_ds.config import to_yaml
from ddk_ds.engine.model_files import read_model
from ddk_ds.engine.student import names_on_disk
from ddk_ds.engine.zero_shards import MODEL_FILE
from ddk_ds.files import partial_path
from ddk_ds.mixture.interval_state import IntervalState
from ddk_ds.train.checkpoint.checkpoint_files import FORMAT, TAG, Manifest, put_in_place
from ddk_ds.train.state import RunState
from tests.dist.tiny import tiny_config

DOMAINS = ("code", "text")
RANKS = 3  # divides no size of the tests' models: slices are padded


def save_run(folder: Path, steps: Sequence[int] = (2, 4), **sections: Any) -> Path:
    """A run over the models folder/student and folder/teacher with checkpoints of these steps; returns its directory.

    The masters of step s are the student's own weights times s.
    """
    config = tiny_config(folder, **sections)
    root = config.run_dir / "checkpoints"
    root.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    lines = [_interval(step) for step in range(0, max(steps) + 1, 2)]
    (config.run_dir / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = read_model(Path(config.student.path), "student.path")
    for step in steps:
        state = RunState(
            IntervalState.new([{"name": name, "num_samples": 9, "sha": ""} for name in DOMAINS], seed=0),
            step=step,
            domain_tokens=[1000 * step, 3000 * step],
            student_before=[40.0, 50.0],
        )
        manifest = Manifest(FORMAT, step, RANKS, 0, {"content.student": files.fingerprint}, {"torch": "2.9"}, {})
        partial = partial_path(root / f"step-{step:08d}")
        (partial / TAG).mkdir(parents=True)
        _write_shards(partial / TAG, Path(config.student.path), step, state)
        assert not put_in_place(partial, root / f"step-{step:08d}", manifest)
    return config.run_dir


def _interval(step: int) -> dict[str, Any]:
    def by_domain(*values: float) -> dict[str, float]:
        return dict(zip(DOMAINS, values, strict=True))

    return {
        "kind": "interval",
        "step": step,
        "student_ppl": by_domain(40.0 - step, 50.0 - step),
        "teacher_ppl": by_domain(20.0, 25.0),
        "proportions": by_domain(0.25 + step / 100, 0.75 - step / 100),
    }


def _write_shards(directory: Path, student: Path, factor: float, state: RunState) -> None:
    files = read_model(student, "student.path")
    shapes, slices = {}, [[] for _ in range(RANKS)]  # type: ignore[var-annotated]
    for name, on_disk in names_on_disk(files, trusted=False).items():
        with safe_open(files.tensors[on_disk].file, framework="pt") as reader:
            tensor = reader.get_tensor(on_disk).float() * factor
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
