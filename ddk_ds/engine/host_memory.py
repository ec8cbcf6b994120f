"""Give freed host memory back at once while a model is loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

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
