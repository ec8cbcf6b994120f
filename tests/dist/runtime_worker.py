"""Functions that every rank of test_runtime.py runs."""

from __future__ import annotations

import os
from pathlib import Path

import deepspeed
import torch

from ddk_ds.engine.runtime import Runtime


def shared_memory(runtime: Runtime) -> tuple[float, list[str], bool]:
    """Return DeepSpeed's sum over ranks, this job's names in /dev/shm, and True if this rank maps an unlinked one."""
    numbers = torch.full((1000,), runtime.comm.rank + 1.0)
    deepspeed.comm.all_reduce(numbers)
    runtime.comm.barrier()
    port = os.environ["MASTER_PORT"]
    names = [path.name for path in Path("/dev/shm").iterdir() if f"_{port}_" in path.name]
    return float(numbers.mean()), names, f"_{port}_1 (deleted)" in Path("/proc/self/maps").read_text()


def shortest_timeout_s(runtime: Runtime) -> float:
    """Return the shortest timeout of a group, after one was made as DeepSpeed makes them: without naming a timeout."""
    torch.distributed.new_group(list(range(runtime.comm.world_size)))
    groups = torch.distributed.distributed_c10d._world.pg_map
    options = [group._get_backend(torch.device("cpu")).options for group in groups]
    return min(option._timeout.total_seconds() for option in options)
