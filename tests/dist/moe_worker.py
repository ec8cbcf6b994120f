"""Functions that every rank of test_moe.py runs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ddk_ds.engine.model_files import read_model
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.teacher import load_teacher
from ddk_ds.train.loop import train
from tests.dist.resume_worker import prepare
from tests.dist.tiny import VOCAB, save_model, tiny_config


def off_in_bf16(runtime: Runtime, folder: str, shape: dict[str, Any]) -> float:
    """Return how far a teacher in bf16 is from the plain model in bf16, whose routers transformers may keep exact."""
    root = Path(folder)
    if runtime.comm.rank == 0:
        save_model(root / "teacher", vocab=VOCAB, tied=False, seed=2, **shape)
    runtime.comm.barrier()
    config = tiny_config(root, teacher={"attn_implementation": "eager"}, train={"precision": "bf16"})
    teacher = load_teacher(config, read_model(root / "teacher", "teacher.path"), VOCAB, runtime.comm)
    ids = torch.randint(0, VOCAB, (8, 24), generator=torch.Generator().manual_seed(0))
    [hidden] = teacher.hidden([ids])
    plain = AutoModelForCausalLM.from_pretrained(
        root / "teacher", dtype=torch.bfloat16, attn_implementation="eager"
    ).base_model(ids, use_cache=False)
    exact = plain.last_hidden_state.flatten(0, 1).float()
    return float((hidden.float() - exact).abs().mean() / exact.abs().mean())


def train_until_killed(runtime: Runtime, config_path: str, name: str, lines: int) -> None:
    """Train until the run's ledger has that many lines; then the first rank kills itself."""
    run = prepare(runtime, config_path, name)
    write, ledger = run.ledger.write, run.config.run_dir / "ledger.jsonl"

    def killing(record: dict[str, Any]) -> None:
        write(record)
        if runtime.comm.rank == 0 and len(ledger.read_text().splitlines()) >= lines:
            os.kill(os.getpid(), signal.SIGKILL)

    run.ledger.write = killing  # type: ignore[method-assign]
    train(run)
