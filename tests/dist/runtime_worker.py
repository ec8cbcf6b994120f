"""Functions that every rank of test_runtime.py runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.distributed import distributed_c10d

from ddk_ds.config import load_config
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.student import load_student
from ddk_ds.train.inputs import check_inputs


def shared_memory(runtime: Runtime) -> tuple[float, list[str], bool]:
    """Return DeepSpeed's sum over ranks, this job's names in /dev/shm, and True if this rank maps an unlinked one."""
    numbers = torch.full((1000,), runtime.comm.rank + 1.0)
    deepspeed.comm.all_reduce(numbers)
    runtime.comm.barrier()
    port = os.environ["MASTER_PORT"]
    names = [path.name for path in Path("/dev/shm").iterdir() if f"_{port}_" in path.name]
    return float(numbers.mean()), names, f"_{port}_1 (deleted)" in Path("/proc/self/maps").read_text()


def timeouts_s(runtime: Runtime, config_path: str) -> dict[str, list[float]]:
    """Return the timeouts of all groups, by what made them; "NCCL" is that of its groups that are made without one."""
    found: dict[str, list[float]] = {}
    groups = distributed_c10d._world.pg_map
    known: set[Any] = set()

    def ask(maker: str) -> None:
        new = [group for group in groups if group not in known]
        known.update(new)
        options = [group._get_backend(torch.device("cpu")).options for group in new]
        found[maker] = [option._timeout.total_seconds() for option in options]

    ask("runtime")
    config = load_config(config_path)
    inputs = check_inputs(config, runtime.comm)
    load_student(config, inputs.student, inputs.tokenizer.vocab_size, runtime.comm)
    deepspeed.comm.new_group([0, 1])
    ask("DeepSpeed")
    torch.distributed.new_group([0, 1], backend="gloo")
    ask("gloo beside")
    found["NCCL"] = [distributed_c10d._get_default_timeout("nccl").total_seconds()]
    return found
