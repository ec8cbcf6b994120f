"""The stage clock sums seconds and keeps peak memory for each stage of a step."""

from __future__ import annotations

import mmap
import time

import numpy as np
import pytest

from ddk_ds.engine.stage_clock import OTHER, StageClock


def test_a_stage_within_another_counts_for_itself() -> None:
    clock = StageClock("cpu")
    started = time.perf_counter()
    with clock.stage("forward"):
        time.sleep(0.02)
        with clock.stage("head"):
            time.sleep(0.04)
            with clock.waiting("gather"):
                time.sleep(0.06)
        time.sleep(0.02)
    took = time.perf_counter() - started
    seconds = clock.take_seconds()
    assert sum(seconds.values()) == pytest.approx(took, abs=0.02)
    # A busy machine sleeps longer; a stage that counted one within it would have at least its time more.
    assert seconds["forward"] >= 0.04 and seconds["head"] >= 0.04 and seconds["gather"] >= 0.06
    assert clock.take_seconds() == {}


def test_a_stage_ends_with_an_exception_and_nothing_counts_while_paused() -> None:
    clock = StageClock("cpu", measure_memory=True)
    with pytest.raises(KeyError), clock.stage("forward"):
        raise KeyError
    with clock.paused(), clock.stage("teacher"):
        pass
    with clock.stage("forward"):
        pass
    assert set(clock.take_seconds()) == {"forward"}
    assert set(clock.take_peaks()) == {OTHER, "forward"}


def test_a_peak_belongs_to_the_stage_that_it_was_reached_in() -> None:
    clock = StageClock("cpu", measure_memory=True)

    def hold(megabytes: int) -> None:
        block = mmap.mmap(-1, megabytes * 2**20)  # the allocator may keep what is freed, this is given back
        np.frombuffer(block, np.uint8).fill(1)
        block.close()

    with clock.stage("forward"):
        hold(64)
        with clock.stage("head"):
            hold(256)
        with clock.waiting("gather"):  # waits are too many and too short to read the memory
            hold(128)
    peaks = clock.take_peaks()
    assert set(peaks) == {OTHER, "forward", "head"}
    assert peaks["head"] - peaks["forward"] == pytest.approx(128 * 2**20, rel=0.1)
    with clock.stage("forward"):
        pass
    assert clock.take_peaks()["forward"] < peaks["forward"] - 100 * 2**20, "each step begins a new peak"
