"""Functions that every rank of test_export.py runs."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from ddk_ds.commands.export_command import main
from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.process_memory import held_bytes, peak_bytes, reset_peak
from ddk_ds.engine.runtime import Runtime
from ddk_ds.errors import UserError
from ddk_ds.kernels.reference import reference_logits
from ddk_ds.train.loop import train
from tests.dist.resume_worker import prepare

IDS = torch.arange(40).reshape(2, 20) * 7 % 600


def run_and_look(runtime: Runtime, configs: list[str]) -> list[str]:
    """Train each configuration; write the final student's logits and master weights to <run>/seen.safetensors.

    Returns the directories of the runs.
    """
    directories = []
    for config_path in configs:
        run = prepare(runtime, config_path, "whole")
        train(run)
        student = run.student

        def logits(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
            return reference_logits(hidden, head.weight, None, len(head.weight), head.form).float()

        with student.evaluating():
            seen = {"logits": student(IDS, logits).clone()}
        for name, parameter in student.parameters.items():
            if parameter.requires_grad:
                seen[name] = safe_get_full_fp32_param(parameter).cpu().clone()
        if runtime.comm.rank == 0:
            save_file(seen, run.config.run_dir / "seen.safetensors")
        directories.append(str(run.config.run_dir))
        runtime.comm.barrier()
    return directories


def end_among_files(runtime: Runtime, config_path: str) -> list[str]:
    """Train to an end at which rank 0's disk is full, then end again among files of a user's, with a damaged ledger.

    Returns the errors of all ranks at the first end.
    """
    run = prepare(runtime, config_path, "whole")
    run_dir, on_rank_0 = run.config.run_dir, runtime.comm.rank == 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as raised:
        if on_rank_0:
            patch.setattr("ddk_ds.engine.weights._write_shard", full)
        train(run)
    errors = runtime.comm.gather_objects(str(raised.value))
    if on_rank_0:
        assert not (run_dir / "export").exists() and not list(run_dir.glob(".partial-*"))
    run = prepare(runtime, config_path, "whole")
    if on_rank_0:
        (run_dir / "export").mkdir()
        (run_dir / "export/my_notes.txt").write_text("a week of notes")
        ledger = (run_dir / "ledger.jsonl").read_bytes()
        (run_dir / "ledger.jsonl").write_bytes(ledger.replace(b'"kind": "step"', b'"kind": [step"', 1))
    runtime.comm.barrier()
    train(run)
    return errors


def full(*_: object) -> None:
    """Stand in for a disk without space."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def peak_of_export(runtime: Runtime, run: str, small: str) -> dict[str, int]:
    """Return by how many bytes the peak grew while `run` was exported, and the size and number of its files.

    `small` is exported first, because memory that libraries take on their first use is not the export's.
    """
    assert main([small]) == 0
    before = held_bytes("cpu")
    reset_peak("cpu")
    assert main([run, "--max-shard-gb", "0.1"]) == 0
    files = list((Path(run) / "exports").glob("*/*.safetensors"))
    return {
        "grown": peak_bytes("cpu") - before,
        "total": sum(file.stat().st_size for file in files),
        "files": len(files),
    }
