"""Seconds and peak memory of the stages of a training step, and the waits of ZeRO-3 engines for other ranks.

On a GPU seconds are measured by CUDA events, which make nothing wait; on a CPU by the monotonic clock.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils.z3_leaf_module import z3_leaf_module

from ddk_ds.engine.gather_brake import GatherBrake
from ddk_ds.engine.process_memory import allocator_counts, take_peak

OTHER = "other"
"""Name of the time outside of all stages."""


class StageClock:
    """Sums of seconds by stage. Time in an inner stage counts for the inner stage alone, not for the outer one too.

    With `measure_memory` the clock also keeps each stage's peak memory; nothing else in the process may then reset it.
    """

    def __init__(self, device_type: str, *, measure_memory: bool = False) -> None:
        self._device_type = device_type
        self._on_gpu = device_type == "cuda"
        self._measure_memory = measure_memory
        self._open: list[str] = []
        self._since: Any = None
        self._spans: deque[tuple[str, Any, Any]] = deque()
        self._peaks: dict[str, int] = {}
        self._counted: dict[str, int] = {}
        self._paused = False

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds of the block on this rank's current stream, and its peak memory, under `name`."""
        self._note_peak()
        with self.waiting(name):
            try:
                yield
            finally:
                self._note_peak()

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Count the seconds of the block under `name`, without memory: for the many short waits for other ranks."""
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
        """Count nothing in the block, which is work outside of a training step."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def take_seconds(self) -> dict[str, float]:
        """Return the seconds by stage since the last call; what a GPU has not come to yet is left to the next call."""
        seconds: dict[str, float] = defaultdict(float)
        while self._spans and (not self._on_gpu or self._spans[0][2].query()):
            name, start, end = self._spans.popleft()
            seconds[name] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        return dict(seconds)

    def take_peaks(self) -> dict[str, int]:
        """Return the peak bytes in each stage, and outside of all stages (`OTHER`), since the last call."""
        self._note_peak()
        peaks, self._peaks = self._peaks, {}
        return peaks

    def take_allocator(self) -> dict[str, int]:
        """Return the bytes that torch's allocator has reserved on the GPU, and its failures since the last call.

        Its "retries" emptied its cache and then found memory, its "ooms" found none. {} on a CPU.
        """
        if not (self._measure_memory and self._on_gpu):
            return {}
        before, self._counted = self._counted, allocator_counts()
        return {key: value - before.get(key, 0) for key, value in self._counted.items()} | {
            "reserved": torch.cuda.memory_reserved()
        }

    def _note_peak(self) -> None:
        if self._measure_memory and not self._paused:
            name = self._open[-1] if self._open else OTHER
            self._peaks[name] = max(self._peaks.get(name, 0), take_peak(self._device_type))

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


def time_gathers(coordinator: Any, brake: GatherBrake, clock: StageClock, name: str) -> None:
    """Make a ZeRO-3 engine's coordinator heed the brake, and count its waits for weights under `name`.

    On a GPU a gather that was prefetched and runs during computation costs its stream nothing and counts nothing.
    """
    fetch = coordinator.fetch_sub_module

    def timed(module: Any, forward: bool) -> None:
        parameters = [p for p in module.parameters(recurse=z3_leaf_module(module)) if not p.ds_persist]
        if parameters:  # all of them: some may have come with the module before
            brake.hold(sum(parameter.ds_numel for parameter in parameters))
        if all(parameter.ds_status == ZeroParamStatus.AVAILABLE for parameter in parameters):
            fetch(module, forward)
            return
        with clock.waiting(name):
            fetch(module, forward)

    coordinator.fetch_sub_module = timed


def time_reductions(optimizer: Any, clock: StageClock, name: str) -> None:
    """Make a ZeRO-3 optimizer count its reductions of gradients under `name`.

    On a GPU only the part that is left when the backward pass has ended takes time of its stream; on a CPU all of it.
    """
    for method in ("reduce_independent_p_g_buckets_and_remove_grads", "independent_gradient_partition_epilogue"):
        setattr(optimizer, method, _timed(getattr(optimizer, method), clock, name))


def _timed(function: Callable[..., Any], clock: StageClock, name: str) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        with clock.waiting(name):
            return function(*arguments)

    return timed
