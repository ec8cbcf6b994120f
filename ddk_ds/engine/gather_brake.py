"""A brake on the host, which otherwise runs far ahead of the GPU and gathers a layer long before it is computed.

The memory of a released layer can be used again when the GPU has computed it, not when the host has queued that. ZeRO-3
waits for its gathers alone: a host that takes a third of the GPU's time for a layer has 30 layers gathered at a time,
until the allocator has no memory left, empties its cache and tries again, in silence. torch's FSDP has the same brake
(limit_all_gathers).
"""

from __future__ import annotations

from collections import deque
from typing import Any

from ddk_ds.engine.ds_config import lead_elements


class GatherBrake:
    """Makes the host wait before a module's gather while weights of more than two layers await their computation.

    It holds in every pass: forward, recomputation and backward. On a device that computes as it is told (a CPU) it does
    nothing.
    """

    def __init__(self, accelerator: Any, largest_layer: int) -> None:
        """Take DeepSpeed's `accelerator` and the elements of the model's largest layer."""
        self._accelerator = accelerator
        self._limit = lead_elements(largest_layer)
        self._queue: deque[tuple[Any, int]] = deque()
        self._queued = 0
        self._last = 0

    def hold(self, elements: int) -> None:
        """Return when a module of so many sharded `elements` may be gathered, and the one after it prefetched.

        Must be called before each module, on the stream that computes.
        """
        if self._accelerator.handles_memory_backpressure():
            return
        if self._last:
            event = self._accelerator.Event()
            event.record()  # passed when the module of the gather before has been computed
            self._queue.append((event, self._last))
            self._queued += self._last
        while self._queued > self._limit:
            event, computed = self._queue.popleft()
            event.synchronize()
            self._queued -= computed
        self._last = elements
