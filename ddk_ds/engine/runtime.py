"""Start of a rank: DeepSpeed's process group, the device, the number of threads, and what ranks wait for together."""

from __future__ import annotations

import fcntl
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from ddk_ds.comm import Comm, ProcessGroup, set_default_timeout
from ddk_ds.config import Limits
from ddk_ds.engine.process_memory import peak_bytes
from ddk_ds.files import write_text


@dataclass(frozen=True)
class Runtime:
    """The device that this process computes on, and its connection to the other ranks."""

    comm: Comm
    device: torch.device


def start_runtime(limits: Limits = Limits()) -> Runtime:  # noqa: B008
    """Join the process group that the launcher described in the environment. Collective.

    Its collectives wait longer than any of `limits`.
    """
    # DeepSpeed unpickles what it loads. With this, torch.load accepts only tensors and plain values in every call.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    # Compiled by `make setup`. DeepSpeed's default is one directory for all environments of a user, which would then
    # compile the extensions again in turns, while ranks wait.
    compiled = Path(sys.prefix) / "torch_extensions"
    if compiled.is_dir():
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(compiled))
    accelerator = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if accelerator.device_name() == "cpu":
        # PyTorch takes every core for each process; ranks that share a machine would compete for them.
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
        load_communication()
    else:
        accelerator.set_device(local_rank)
    timeout = set_default_timeout(limits.collective_s)
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), timeout=timeout, verbose=False)
    comm = ProcessGroup(local_rank)
    _unlink_shared_memory(comm.rank)
    return Runtime(comm, torch.device(accelerator.device_name(), local_rank))


def load_communication() -> None:
    """Load DeepSpeed's shared-memory communication for ranks on a CPU.

    It is compiled first, unless that was done with the same versions of Python, torch and DeepSpeed. Torch's loader is
    used only for compiling, for two reasons:

    - It asks ninja at each start, which compiles again, for a minute, whenever a path is spelt differently
      (.venv/bin/python, the script `deepspeed`).
    - Its lock is a file that a killed process leaves behind, and then every later start waits for ever. The lock taken
      here is freed by the kernel. The process that holds it can delete a lock file of torch, which must be left over.
    """
    from deepspeed.ops.op_builder import ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory, _import_module_from_library  # warns: there is no CUDA

    builder = ShareMemCommBuilder()
    folder = Path(_get_build_directory(builder.name, verbose=False))
    versions = f"python {sys.version}, torch {torch.__version__}, deepspeed {deepspeed.__version__}"
    compiled_for = folder / "compiled_for.txt"
    if not compiled_for.is_file() or compiled_for.read_text() != versions:
        with open(folder / "compiling.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Another rank may have compiled it while this one waited for the lock.
            if not compiled_for.is_file() or compiled_for.read_text() != versions:
                (folder / "lock").unlink(missing_ok=True)
                builder.load(verbose=False)
                write_text(compiled_for, versions)
    builder._loaded_ops[builder.name] = _import_module_from_library(builder.name, str(folder), is_python_module=True)


def _unlink_shared_memory(rank: int) -> None:
    """Remove the name of the 66 MiB in /dev/shm that DeepSpeed's ranks on a CPU have mapped for this rank.

    DeepSpeed never removes it, whether a rank ends or is killed: after some hundred starts a machine has no memory
    left. The mappings stay, and every rank has its own by now, because all of them have met since.
    """
    job = "_".join([str(os.getuid()), os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")])
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{job}_{rank}").unlink(missing_ok=True)


def synchronize(runtime: Runtime) -> None:
    """Wait until all ranks and their devices have finished their work, before a time is taken. Collective."""
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    runtime.comm.barrier()


def memory_figures(runtime: Runtime) -> dict[str, int | None]:
    """Return the largest `peak_bytes` of a rank, and the bytes that CUDA's allocator reserved here. Collective."""
    peak = torch.tensor(float(peak_bytes(runtime.device.type)), device=runtime.device)
    reserved = torch.cuda.max_memory_reserved() if runtime.device.type == "cuda" else None
    return {"peak_bytes": int(runtime.comm.all_reduce_max(peak)), "reserved_bytes": reserved}
