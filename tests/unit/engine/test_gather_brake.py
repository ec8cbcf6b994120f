"""The brake holds the host's lead over the GPU at two layers: in the events it waits for, and in a model of time."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.stage3 as deepspeed_stage3
import pytest
import torch

import ddk_ds.engine
from ddk_ds.engine.gather_brake import GatherBrake
from ddk_ds.engine.memory_estimate import teacher_gathered
from ddk_ds.engine.model_files import ModelShape
from ddk_ds.engine.stage_clock import StageClock

LAYER = 275_000_000  # elements of a layer of Qwen2.5-14B, which has 48 and an embedding of 152,064 x 5,120
LAYERS, HEAD = 48, 152_064 * 5120


class Timeline:
    """An accelerator, and a model of a host, a GPU's stream of gathers and its stream of computation, in seconds.

    The host queues a layer's computation and the gather of the next layer. Both streams do one thing after the other.
    """

    def __init__(self, *, braked: bool, host_s: float, gather_s: float, compute_s: float) -> None:
        self._host_s, self._gather_s, self._compute_s = host_s, gather_s, compute_s
        self._braked = braked
        self.now = self.gathered_at = self.computed_at = 0.0
        self.changes: list[tuple[float, int]] = []  # elements that are allocated (+) and can be used again (-)

    def handles_memory_backpressure(self) -> bool:
        return not self._braked

    def Event(self) -> Any:
        return _Event(self)

    def run(self, sizes: list[int], brake: GatherBrake) -> None:
        """Compute modules of these sizes, all of which but the first are gathered ahead."""
        ready = None
        for number, elements in enumerate(sizes):
            brake.hold(elements)
            computed_from = ready or self._gather(elements)
            if number + 1 < len(sizes):
                ready = self._gather(sizes[number + 1])
            self.now += self._host_s
            self.computed_at = max(self.computed_at, computed_from, self.now) + self._compute_s * elements / LAYER
            self.changes.append((self.computed_at, -elements))

    def _gather(self, elements: int) -> float:
        self.changes.append((self.now, elements))
        self.gathered_at = max(self.now, self.gathered_at) + self._gather_s * elements / LAYER
        return self.gathered_at

    def finish(self) -> None:
        """Let the host wait until all is computed: other work lies between two passes."""
        self.now = max(self.now, self.computed_at)

    def peak(self) -> int:
        held = most = 0
        for _, change in sorted(self.changes):
            held += change
            most = max(most, held)
        return most


class _Event:
    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._at = 0.0

    def record(self) -> None:
        self._at = self._timeline.computed_at

    def synchronize(self) -> None:
        self._timeline.now = max(self._timeline.now, self._at)


def timeline(*, braked: bool, host_s: float, compute_s: float = 6e-3, passes: int = 2) -> Timeline:
    model = Timeline(braked=braked, host_s=host_s, gather_s=4e-3, compute_s=compute_s)
    brake = GatherBrake(model, LAYER)
    for _ in range(passes):
        model.run([LAYER] * LAYERS, brake)
    return model


@pytest.mark.parametrize("host_s", [1e-4, 2e-3])
def test_a_fast_host_has_two_layers_of_lead_and_loses_no_time(host_s: float) -> None:
    free, braked = (timeline(braked=braked, host_s=host_s) for braked in (False, True))
    assert free.peak() > 20 * LAYER, "the model shows what the brake is for"
    assert braked.peak() <= 4 * LAYER  # two that await their computation, the one that is queued, the next one
    assert braked.computed_at == pytest.approx(free.computed_at, rel=1e-3)


def test_a_host_that_is_slower_than_the_gpu_never_waits() -> None:
    free, braked = (timeline(braked=braked, host_s=8e-3) for braked in (False, True))
    assert braked.now == free.now and braked.peak() == free.peak() <= 3 * LAYER


def test_the_memory_estimate_has_the_brakes_lead() -> None:
    """The teacher's pass from the embedding to the head: what the model of time holds at most is what is planned."""
    shape = ModelShape(
        tensors=(HEAD, *[LAYER] * LAYERS, HEAD),
        largest_layer=LAYER,
        head=HEAD,
        layers=LAYERS,
        hidden=5120,
        attention=5120,
        key_value=1024,
        intermediate=13824,
        gated=True,
        heads=40,
    )
    model = Timeline(braked=True, host_s=1e-4, gather_s=1e-3, compute_s=6e-3)
    brake = GatherBrake(model, LAYER)
    for _ in range(2):
        model.run([HEAD, *[LAYER] * LAYERS], brake)
        model.finish()
    assert model.peak() == max(HEAD + LAYER, 4 * LAYER)
    brake.hold(HEAD)  # the head is gathered while the last layers are computed
    assert teacher_gathered(shape, "cuda") == max(model.peak(), 2 * LAYER + HEAD)
    narrow = replace(shape, head=LAYER)
    assert teacher_gathered(narrow, "cuda") == model.peak() == 4 * LAYER
    assert teacher_gathered(shape, "cpu") == HEAD + LAYER


def test_modules_smaller_than_a_layer_are_counted_by_their_elements() -> None:
    """Without whole layers each matrix is gathered by itself; an embedding may be larger than two layers."""
    waits: list[int] = []
    made = Counter[str]()

    class Event:
        def record(self) -> None:
            made["events"] += 1
            self.number = made["events"]

        def synchronize(self) -> None:
            waits.append(self.number)

    accelerator: Any = type("Accelerator", (), {"handles_memory_backpressure": lambda _: False, "Event": Event})()
    brake = GatherBrake(accelerator, 100)
    for _ in range(9):
        brake.hold(50)  # half a layer: the fifth gather has four before it, two layers
    assert waits == [1, 2, 3, 4]
    brake.hold(1000)
    assert waits == [1, 2, 3, 4, 5]
    brake.hold(50)  # waits for the large one alone, and so for all before it
    assert waits[-1] == 10 and made["events"] == 10


def test_deepspeeds_warning_of_a_full_gpu_is_told(caplog: pytest.LogCaptureFixture) -> None:
    source = Path(deepspeed_stage3.__file__).read_text()
    told = '"%d pytorch allocator cache flushes since last step.'
    assert told in source, "DeepSpeed words its warning differently: ddk_ds/engine/__init__.py"
    record = logging.LogRecord("DeepSpeed", logging.WARNING, "", 0, told.strip('"'), (3,), None)
    other = logging.LogRecord("DeepSpeed", logging.WARNING, "", 0, "a warning of no use", (), None)
    assert ddk_ds.engine._is_told(record) and not ddk_ds.engine._is_told(other)
    kept = [logging.getLogger("DeepSpeed").filter(each) for each in (record, other)]
    assert bool(kept[0]) and not kept[1]


def test_the_allocators_failures_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[str, int] = {}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda: counts)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 70)
    clock = StageClock("cuda", measure_memory=True)
    assert clock.take_allocator() == {"reserved": 70, "retries": 0, "ooms": 0}
    counts |= {"num_alloc_retries": 7, "num_ooms": 1}
    assert clock.take_allocator() == {"reserved": 70, "retries": 7, "ooms": 1}
    counts["num_alloc_retries"] = 9
    assert clock.take_allocator() == {"reserved": 70, "retries": 2, "ooms": 0}
    assert StageClock("cpu", measure_memory=True).take_allocator() == {}
