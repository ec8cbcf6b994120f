"""Environment variables of a rank that torch, NCCL and Triton read once: set before any of them is imported."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def set_rank_environment() -> None:
    """Set what the user has not set; an empty value counts as set.

    - torch's allocator grows its segments. Otherwise gathered layers, logits and activations of many sizes leave holes:
      memory that is reserved, free, and of no use.
    - NCCL starts the kernels of different communicators in the order of the program. A rank has several, whose
      collectives run at the same time and could wait for one another in two orders.
    - What Triton and torch.compile have compiled lies on the node's own disk, where the next start finds it. Triton's
      default is below the home directory, which nodes share: all ranks would look up, write and rename files there at
      the same time. That of torch.compile is a name that another user of the node may have taken.
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    caches = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    if not caches.keys() <= os.environ.keys() and (own := _own_directory()) is not None:
        for variable, folder in caches.items():
            os.environ.setdefault(variable, str(own / folder))


def _own_directory() -> Path | None:
    """Return a directory for temporary files that nobody else can write to; None if there is none.

    Its name is known to everyone, so another user may have made it, with code that this rank would run.
    """
    path = Path(tempfile.gettempdir()) / f"ddk-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return None
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return path if is_own else None
