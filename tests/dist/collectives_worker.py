"""Functions that every rank of test_collectives.py runs: the collectives of a step, by kind and dtype."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddk_ds.engine import ds_config
from ddk_ds.engine.model_files import read_model
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.student import Student, load_student
from ddk_ds.engine.teacher import load_teacher
from ddk_ds.kernels import Options
from ddk_ds.methods import make_method
from ddk_ds.train.step import train_step
from tests.dist.tiny import VOCAB, save_model, tiny_config

MICRO_BATCHES, LENGTH, STEPS = 2, 16, 3


class Collectives(TorchDispatchMode):
    """Counts the calls of torch's process groups by this thread, by operator and dtype; collects the groups."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        self.groups: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            leaves = torch.utils._pytree.tree_leaves(args)
            tensor = next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
            self.counted[f"{func._opname} {str(tensor.dtype).removeprefix('torch.')}"] += 1
            [group] = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf)]
            self.groups.add(torch.distributed.ProcessGroup.unbox(group).group_name)
        return func(*args, **(kwargs or {}))


def steps(runtime: Runtime, folder: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make three steps of each case: layers and width of the student, and sections of the configuration.

    A bucket holds the elements of a layer, as a real model's does. Returns for each case the collectives of the last
    step, the names of the student's parameters that stay whole on every rank, and of the process groups used, and if
    torch's compiler was imported.
    """
    ds_config.MIN_BUCKET_ELEMENTS = 1
    return [_case(runtime, Path(folder) / str(number), **case) for number, case in enumerate(cases)]


def _case(runtime: Runtime, root: Path, layers: int, hidden: int, **sections: Any) -> dict[str, Any]:
    comm = runtime.comm
    if comm.rank == 0:
        save_model(
            root / "student",
            hidden=hidden,
            vocab=VOCAB + 6,
            tied=True,
            seed=1,
            num_hidden_layers=layers,
            intermediate_size=hidden,
        )
        save_model(root / "teacher", hidden=32, vocab=VOCAB, tied=False, seed=2)
    comm.barrier()
    samples = MICRO_BATCHES * comm.world_size
    train = {"global_batch_samples": samples, "precision": "bf16", **sections.pop("train", {})}
    config = tiny_config(root, **{"method": "kd", "train": train, "deepspeed": {"zero_optimization": {}}, **sections})
    files, teacher_files = (read_model(root / name, name) for name in ("student", "teacher"))
    with Collectives() as loading:
        teacher = load_teacher(config, teacher_files, VOCAB, comm)
        student = load_student(config, files, VOCAB, comm)
    method = make_method(config, teacher, Options(VOCAB, gamma=0.2, chunk_tokens=16), 1, {})
    rows = torch.randint(0, VOCAB, (STEPS, MICRO_BATCHES, comm.world_size, LENGTH))
    for step in rows:
        batches: Any = [
            {"input_ids": ids[None], **dict.fromkeys(("domain", "sample_id"), torch.zeros(1, dtype=torch.int64))}
            for ids in step[:, comm.rank]
        ]
        with Collectives() as collectives:
            train_step(
                student,
                method,
                batches,
                learning_rate=1e-3,
                progress=0.0,
                num_domains=1,
                device=runtime.device,
                comm=comm,
            )
    groups = sorted(loading.groups | collectives.groups)
    result = {"counted": dict(collectives.counted), "whole": _whole(student), "groups": groups}
    return {**result, "compiler": "torch._inductor.compile_fx" in sys.modules}


def _whole(student: Student) -> list[str]:
    return [name for name, p in student.engine.module.named_parameters() if p.ds_persist]
