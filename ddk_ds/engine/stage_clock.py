"""Seconds and peak memory of the parts of a step: CUDA events, which make nobody wait, or a CPU's monotonic clock."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ddk_ds.engine.peak_memory import PeakMemory

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
