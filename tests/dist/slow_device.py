"""A fake GPU for the distributed tests: an accelerator that computes nothing until the host waits for it.

Numbers are those of a CPU. What a GPU's streams and events would do is only kept in books: what the host waits for, and
which released weights the GPU has not computed with yet, whose memory it could not use again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator


class SlowDevice(CPU_Accelerator):  # type: ignore[misc]  # DeepSpeed has no types
    """Books of streams, events and weights; `install` makes it DeepSpeed's accelerator in this process."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """How often the host waited: for "event", "stream" or "device"."""
        self.queued: list[_Release] = []
        """The releases of weights that the device has not come to, in their order."""
        self._passed = 0
        self._streams: list[Any] = [_Stream(self)]

    @classmethod
    def install(cls) -> SlowDevice:
        device = cls()
        set_accelerator(device)
        torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign,assignment]
        return device

    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return True

    def resolves_data_dependency(self) -> bool:
        return False

    def handles_memory_backpressure(self) -> bool:
        return False

    @property
    def Stream(self) -> Any:
        return lambda *_, **__: _Stream(self)

    @property
    def Event(self) -> Any:
        return lambda *_, **__: _Event(self)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self._streams.append(stream)
        yield
        self._streams.pop()

    def current_stream(self, device_index: Any = None) -> Any:
        return self._streams[-1]

    def default_stream(self, device_index: Any = None) -> Any:
        return self._streams[0]

    def synchronize(self, device_index: Any = None) -> None:
        self.waits["device"] += 1
        self.compute(self.mark())

    def mark(self) -> int:
        """Return the place behind all that is queued."""
        return self._passed + len(self.queued)

    def compute(self, mark: int) -> None:
        """Come to that place: weights that were released before it are gone."""
        while self._passed < mark:
            self.queued.pop(0).gone()
            self._passed += 1


class Weights:
    """The elements of one model's weights that are gathered, or released and not computed with yet."""

    def __init__(self, device: SlowDevice, coordinator: Any) -> None:
        self.held = self.most = 0
        gather, release = (
            f"_PartitionedParameterCoordinator__{name}" for name in ("all_gather_params_", "release_param")
        )
        gather_now, release_now = getattr(coordinator, gather), getattr(coordinator, release)

        def gathered(params: Any, *arguments: Any, **options: Any) -> None:
            self.held += sum(param.ds_numel for param in params if param.ds_status.name == "NOT_AVAILABLE")
            self.most = max(self.most, self.held)
            gather_now(params, *arguments, **options)

        def released(param: Any, *arguments: Any) -> None:
            before = param.ds_status.name
            release_now(param, *arguments)
            if (before, param.ds_status.name) == ("AVAILABLE", "NOT_AVAILABLE"):
                device.queued.append(_Release(self, param.ds_numel))

        setattr(coordinator, gather, gathered)
        setattr(coordinator, release, released)


class _Release:
    def __init__(self, weights: Weights, elements: int) -> None:
        self._weights, self._elements = weights, elements

    def gone(self) -> None:
        self._weights.held -= self._elements


class _Stream:
    def __init__(self, device: SlowDevice) -> None:
        self._device = device
        self._mark = 0

    def mark(self) -> int:
        """Return the place that the device has come to when it has done all that is queued on this stream."""
        return self._device.mark() if self is self._device.default_stream() else self._mark

    def wait_stream(self, other: Any) -> None:
        """Wait on the device alone: the host goes on."""
        self._mark = max(self._mark, other.mark())

    def synchronize(self) -> None:
        self._device.waits["stream"] += 1
        self._device.compute(self.mark())


class _Event:
    def __init__(self, device: SlowDevice) -> None:
        self._device = device
        self._mark = 0

    def record(self, stream: Any = None) -> None:
        self._mark = self._device.current_stream().mark()

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self._device.waits["event"] += 1
        self._device.compute(self._mark)
