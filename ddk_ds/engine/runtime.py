"""One process's place in the job: DeepSpeed's process group, the device, the threads.

Give freed host memory back at once while a model is loaded.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import resource
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from ddk_ds.comm import Comm, ProcessGroup
from ddk_ds.files import write_text

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Runtime:
    """Where this process computes and whom it talks to."""

    comm: Comm
    device: torch.device


def start_runtime() -> Runtime:
    """Join the process group that the launcher described in the environment. Collective."""
    quieten()
    # DeepSpeed unpickles what it loads; with this torch.load takes tensors and plain values alone, whatever is asked.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    # Compiled by `make setup`. DeepSpeed's default is one place for all environments of a user, which then compile it
    # again in turns, while ranks wait.
    compiled = Path(sys.prefix) / "torch_extensions"
    if compiled.is_dir():
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(compiled))
    _end_with_the_launcher()
    accelerator = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if accelerator.device_name() == "cpu":
        # PyTorch takes every core for each process; ranks that share a machine would fight over them.
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
        load_communication()
    else:
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    comm = ProcessGroup(local_rank)
    _forget_shared_memory(comm.rank)
    return Runtime(comm, torch.device(accelerator.device_name(), local_rank))


def load_communication() -> None:
    """Load DeepSpeed's shared-memory communication of ranks on a CPU, compiled where these versions were not yet.

    By torch's loader each start asks ninja, which compiles again, for a minute, whenever a path was spelt otherwise
    (.venv/bin/python, the script `deepspeed`); and its lock is a file, which a killed process leaves behind: then every
    later start waits for ever. The kernel frees ours, and whoever has it knows that torch's is such a left-over.
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
            if not compiled_for.is_file() or compiled_for.read_text() != versions:  # no other rank has done it by now
                (folder / "lock").unlink(missing_ok=True)
                builder.load(verbose=False)
                write_text(compiled_for, versions)
    builder._loaded_ops[builder.name] = _import_module_from_library(builder.name, str(folder), is_python_module=True)


def _forget_shared_memory(rank: int) -> None:
    """Remove the name under which DeepSpeed's ranks on a CPU have mapped this rank's 66 MiB of /dev/shm.

    DeepSpeed never does, whether a rank ends or is killed: after some hundred starts a machine has no memory left. The
    mappings stay, and all ranks have theirs: they have met since.
    """
    place = "_".join([str(os.getuid()), os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")])
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{place}_{rank}").unlink(missing_ok=True)


def _end_with_the_launcher() -> None:
    """A launcher that is killed takes its ranks along, by SIGTERM: they would train on, and nobody would know.

    srun's steps end with their own daemon, whose threads come and go, and the signal is tied to a thread.
    """
    if "SLURM_STEP_ID" not in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: of the device's memory, or of the host's where that computes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def most_memory(runtime: Runtime) -> int:
    """`peak_memory` of the rank that has held the most. Collective."""
    peak = torch.tensor(float(peak_memory(runtime.device)), device=runtime.device)
    return int(runtime.comm.all_reduce_max(peak))


def wait_for_all(runtime: Runtime) -> None:
    """Until all ranks, and their devices, have done what they were asked for: where a time is taken. Collective."""
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    runtime.comm.barrier()


def quieten() -> None:
    """Leave the terminal to what the user must see: warnings of libraries about themselves go."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.utils.logging.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*CUDA initialization.*")


# mallopt's parameters and values (glibc's malloc.h): from this size on, a block is mapped for itself.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALL_BYTES, _LARGE_BYTES = 64 * 1024, 32 * 2**20


@contextmanager
def freed_at_once() -> Iterator[None]:
    """While inside, freed tensors leave the process instead of leaving holes in glibc's heap.

    Measured on a 403 MB model on 2 ranks: the peak grows by 214 MB (the shards, 202 MB, and one tensor) instead of
    547 MB. Afterwards blocks up to 32 MB come from the heap again, glibc's own largest setting, because mapping each
    activation anew would slow training on a CPU. Does nothing on another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _SMALL_BYTES)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE_BYTES)
