"""The most memory that this process holds: of its GPU, or of the host where that computes.

Seconds and peak memory of the parts of a step: CUDA events, which make nobody wait, or a CPU's monotonic clock.

What of a step a ZeRO-3 engine waits for the other ranks.
"""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils.z3_leaf_module import z3_leaf_module

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


OTHER = "other"


class StageClock:
    """Adds up the seconds of named stages; one within another counts for itself, and not for the outer one."""

    def __init__(self, device_type: str, memory: PeakMemory | None = None) -> None:
        self._on_gpu = device_type == "cuda"
        self._memory = memory
        self._open: list[str] = []
        self._since: Any = None
        self._spans: list[tuple[str, Any, Any]] = []
        self._peaks: dict[str, int] = {}
        self._paused = False

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what is computed inside, on this rank's current stream, and the most memory held meanwhile."""
        self._note_peak()
        with self.waiting(name):
            try:
                yield
            finally:
                self._note_peak()

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Count the time inside alone: of the many short waits for other ranks."""
        if self._paused:
            yield
            return
        self._end_span()
        self._open.append(name)
        try:
            yield
        finally:
            self._end_span()
            self._open.pop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside: what is no step."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def take(self) -> dict[str, float]:
        """Seconds by stage since the last call. On a GPU the caller has waited for the device."""
        seconds: dict[str, float] = defaultdict(float)
        for name, start, end in self._spans:
            seconds[name] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        self._spans.clear()
        return dict(seconds)

    def take_peaks(self) -> dict[str, int]:
        """Most bytes held in each stage since the last call, and outside of all (`other`)."""
        self._note_peak()
        peaks, self._peaks = self._peaks, {}
        return peaks

    def _note_peak(self) -> None:
        if self._memory is not None and not self._paused:
            name = self._open[-1] if self._open else OTHER
            self._peaks[name] = max(self._peaks.get(name, 0), self._memory.take())

    def _end_span(self) -> None:
        now = self._now()
        if self._open:
            self._spans.append((self._open[-1], self._since, now))
        self._since = now

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def time_gathers(coordinator: Any, clock: StageClock, name: str) -> None:
    """Count the waits of a ZeRO-3 engine for weights that are not there yet. On a GPU a gather that ran ahead, beside
    computation, costs its stream nothing and counts nothing."""
    fetch = coordinator.fetch_sub_module

    def timed(module: Any, forward: bool) -> None:
        if all(one.ds_status == ZeroParamStatus.AVAILABLE for one in module.parameters(recurse=z3_leaf_module(module))):
            fetch(module, forward)
            return
        with clock.waiting(name):
            fetch(module, forward)

    coordinator.fetch_sub_module = timed


def time_reductions(optimizer: Any, clock: StageClock, name: str) -> None:
    """Count what a ZeRO-3 optimizer's reductions of gradients take of the backward pass: on a GPU what is left of them
    when it has ended, on a CPU all."""
    for method in ("reduce_independent_p_g_buckets_and_remove_grads", "independent_gradient_partition_epilogue"):
        setattr(optimizer, method, _waited_for(getattr(optimizer, method), clock, name))


def _waited_for(function: Callable[..., Any], clock: StageClock, name: str) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        with clock.waiting(name):
            return function(*arguments)

    return timed
