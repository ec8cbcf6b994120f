"""Seconds of the parts of a step: CUDA events, which make nobody wait, or the monotonic clock on a CPU."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StageClock:
    """Adds up the seconds of named stages; one within another counts for the outer one alone."""

    def __init__(self, device_type: str) -> None:
        self._on_gpu = device_type == "cuda"
        self._open = False
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what is computed inside, on this rank's current stream."""
        if self._open:
            yield
            return
        self._open, start = True, self._now()
        try:
            yield
        finally:
            self._open = False
            self._spans.append((name, start, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds by stage since the last call. On a GPU the caller has waited for the device."""
        seconds: dict[str, float] = defaultdict(float)
        for name, start, end in self._spans:
            seconds[name] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        self._spans.clear()
        return dict(seconds)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
