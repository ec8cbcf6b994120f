"""Runs on every rank of test_loading.py."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.model_files import read_model
from ddk_ds.engine.models import load_student, load_teacher
from ddk_ds.engine.runtime import Runtime
from ddk_ds.kernels.reference import reference_logits
from tests.dist.tiny import ARCHITECTURES, VOCAB, save_model, tiny_config


def logits_of_architectures(runtime: Runtime, folder: str) -> dict[str, float]:
    """Largest difference of teacher's and student's logits from plain transformers', by architecture."""
    errors = {}
    for model_type in ARCHITECTURES:
        for tied in (False, True):
            root = Path(folder) / f"{model_type}-{tied}"
            if runtime.comm.rank == 0:
                for name in ("student", "teacher"):
                    save_model(root / name, model_type=model_type, vocab=VOCAB + 3, tied=tied, seed=3)
            runtime.comm.barrier()
            errors[root.name] = _logits_error(root, runtime)
    return errors


def _logits_error(root: Path, runtime: Runtime) -> float:
    config = tiny_config(root)
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))

    def logits(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
        assert head.bias is None
        return reference_logits(hidden, head.weight, None, len(head.weight), head.form).float()

    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(root / "student")(ids).logits.flatten(0, 1)
    worst = 0.0
    for name, load in (("student", load_student), ("teacher", load_teacher)):
        model: Any = load(config, read_model(root / name, f"{name}.path"), VOCAB, runtime.comm)
        with model.evaluating():
            worst = max(worst, float((model(ids, logits) - expected).abs().max()))
    return worst


def peak_memory(runtime: Runtime, folder: str) -> list[dict[str, int]]:
    """Bytes by which each rank's peak grew while a model of many equal tensors was loaded, and what bounds it."""
    root = Path(folder)
    shape = {"hidden": 512, "num_hidden_layers": 24, "intermediate_size": 2048, "num_key_value_heads": 4}
    if runtime.comm.rank == 1:  # not the reader, whose peak is measured
        save_model(root / "small", vocab=VOCAB, tied=True, seed=1)
        save_model(root / "teacher", vocab=VOCAB, tied=True, seed=1, **shape)  # type: ignore[arg-type]
    runtime.comm.barrier()
    config = tiny_config(root)
    # Once with a small model: what libraries take on their first use is not the loader's.
    load_teacher(config, read_model(root / "small", "teacher.path"), VOCAB, runtime.comm)
    files = read_model(root / "teacher", "teacher.path")
    total = 4 * sum(torch.Size(tensor.shape).numel() for tensor in files.tensors.values())
    before = _rss_bytes()
    _reset_peak()
    load_teacher(config, files, VOCAB, runtime.comm)
    grown = _peak_bytes() - before
    largest = 4 * max(torch.Size(tensor.shape).numel() for tensor in files.tensors.values())
    mine = {"grown": grown, "total": total, "largest": largest, "rank": runtime.comm.rank}
    return runtime.comm.gather_objects(mine)


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
