"""The most memory that this process holds: of its GPU, or of the host where that computes."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): VmHWM begins anew at what is resident now


class PeakMemory:
    """Peaks in bytes, one after the other. Nobody else in the process may reset them."""

    def __init__(self, device_type: str) -> None:
        self._on_gpu = device_type == "cuda"
        self.most = 0
        """Of all that `take` has returned."""

    def take(self) -> int:
        """The most since the last call. Where the host's kernel cannot say that: the most so far."""
        if self._on_gpu:
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            peak = _resident_peak()
        self.most = max(self.most, peak)
        return peak


def _resident_peak() -> int:
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        _CLEAR.write_text(_RESET_PEAK)
    except (OSError, StopIteration):  # no Linux, or a sandbox
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(line.split()[1]) * 1024
