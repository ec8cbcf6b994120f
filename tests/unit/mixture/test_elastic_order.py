"""Killed at any step and resumed on any number of ranks, with any micro-batch: no sample lost, none repeated.

Pure computation over 200 kill points; tests/dist/test_elastic.py does it with processes that are killed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pytest

from ddk_ds.data.loader import interval_loader
from ddk_ds.data.mds import Packed
from ddk_ds.mixture.interval_state import DomainEntry, IntervalState, interval_ids
from ddk_ds.mixture.order import DomainOrder
from tests.unit.mixture.mixture_section import exhaustion_of

SIZES = {"code": 130, "maths": 700, "prose": 333}
GLOBAL_BATCH, STEPS, INTERVALS = 24, 6, 6
TOPOLOGIES = [(w, b) for w in (1, 2, 3, 4, 6, 8) for b in (1, 2, 3, 4, 6, 8, 12, 24) if GLOBAL_BATCH % (w * b) == 0]
KILL_POINTS, IN_MAKE_TEST = 200, 40


class Ids:
    """Replacement of MixtureDataset whose samples hold nothing but their id."""

    def read(self, sample_id: int) -> tuple[Packed, int]:
        """Return a sample of one token, and domain 0."""
        return Packed(np.zeros(1, np.uint16), None), 0


@dataclass
class Process:
    """All ranks of one start of the run in one process, from a checkpoint until they are killed."""

    record: dict[str, Any]
    world: int
    micro_batch: int
    steps_per_checkpoint: int = 1

    def run(self, kill_after: int | None = None) -> tuple[list[tuple[int, int, list[int]]], dict[str, Any]]:
        """Return (interval, samples consumed before, ids) of each step in the last checkpoint, and that checkpoint."""
        state = IntervalState.from_json(json.loads(json.dumps(self.record)))
        kept: list[tuple[int, int, list[int]]] = []
        since: list[tuple[int, int, list[int]]] = []
        checkpoint, done = state.to_json(), 0
        while True:
            if state.done:
                if state.interval == INTERVALS - 1:
                    return kept + since, state.to_json()
                state = begin(state)
            ids = order_of(state)
            state = state.seal(ids)
            # Ranks read samples beyond the step in training; a kill discards these samples.
            ranks = [
                interval_loader(
                    Ids(),  # type: ignore[arg-type]
                    ids,
                    rank=rank,
                    world=self.world,
                    micro_batch=self.micro_batch,
                    start_sample=state.consumed,
                )
                for rank in range(self.world)
            ]
            while not state.done:
                if done == kill_after:
                    return kept, checkpoint
                taken = [list(islice(rank, GLOBAL_BATCH // (self.world * self.micro_batch))) for rank in ranks]
                trained = [
                    n for step in zip(*taken, strict=True) for batch in step for n in batch["sample_id"].tolist()
                ]
                since.append((state.interval, state.consumed, trained))
                state, done = state.consume(GLOBAL_BATCH), done + 1
                if done % self.steps_per_checkpoint == 0:
                    kept, since, checkpoint = kept + since, [], state.to_json()
            assert all(next(rank, None) is None for rank in ranks), "a rank has samples left"


def begin(state: IntervalState) -> IntervalState:
    """Begin the next interval, by proportions that change; one domain is at its cap from the third interval on."""
    rng = np.random.default_rng([7, state.interval + 1])
    proportions = rng.dirichlet(np.ones(len(SIZES)))
    exhaustion = exhaustion_of(SIZES, exhaustion_by_domain={"code": "cap"}, max_passes=1)
    draws = exhaustion.draws(proportions, GLOBAL_BATCH * STEPS, state.drawn, state.owed)
    return state.begin(draws.counts, draws.owed)


def order_of(state: IntervalState) -> np.ndarray:
    """Return the global ids of the state's interval."""
    orders = [DomainOrder(name, [50] * (n // 50) + [n % 50], state.seed) for name, n in SIZES.items()]
    sizes = np.array(list(SIZES.values()))
    return interval_ids(orders, np.cumsum(sizes) - sizes, state)


def fresh(seed: int) -> dict[str, Any]:
    entries = [DomainEntry(name=name, num_samples=n, sha="") for name, n in SIZES.items()]
    return IntervalState.new(entries, seed=seed).to_json()


def lost_and_repeated(trained: list[int], expected: list[int]) -> tuple[int, int]:
    """Return the number of samples of `expected` missing in `trained`, and of surplus samples in `trained`."""
    return (Counter(expected) - Counter(trained)).total(), (Counter(trained) - Counter(expected)).total()


def check_kill_points(numbers: range) -> dict[str, int]:
    """Kill a run with its own order for each number at a random step, and resume it on another random topology."""
    totals = {"kill_points": 0, "mid_interval": 0, "lost": 0, "repeated": 0}
    for number in numbers:
        rng = np.random.default_rng([11, number])
        seed = int(rng.integers(0, 1 << 32))
        whole, last = Process(fresh(seed), 1, GLOBAL_BATCH).run()
        world, micro_batch = TOPOLOGIES[rng.integers(len(TOPOLOGIES))]
        kill_after, every = int(rng.integers(0, INTERVALS * STEPS)), int(rng.integers(1, 4))
        head, checkpoint = Process(fresh(seed), world, micro_batch, every).run(kill_after)
        others = [topology for topology in TOPOLOGIES if topology != (world, micro_batch)]
        tail, end = Process(checkpoint, *others[rng.integers(len(others))]).run()
        for interval in range(INTERVALS):
            parts = [[n for i, _, ids in steps if i == interval for n in ids] for steps in (head + tail, whole)]
            lost, repeated = lost_and_repeated(*parts)
            totals["lost"] += lost
            totals["repeated"] += repeated
        assert head + tail == whole and end == last, f"kill point {number}"
        totals["kill_points"] += 1
        totals["mid_interval"] += 0 < checkpoint["consumed"] < GLOBAL_BATCH * STEPS
    assert totals["lost"] == totals["repeated"] == 0
    return totals


def test_kill_points(record_property: Callable[[str, object], None]) -> None:
    totals = check_kill_points(range(IN_MAKE_TEST))
    assert totals["mid_interval"] > IN_MAKE_TEST // 2  # otherwise the test would cover too little
    for name, value in totals.items():
        record_property(name, value)


@pytest.mark.long("all kill points, minutes; make test has a part")
def test_all_kill_points(record_property: Callable[[str, object], None]) -> None:
    totals = check_kill_points(range(KILL_POINTS))
    assert totals["kill_points"] == KILL_POINTS
    for name, value in totals.items():
        record_property(name, value)


def test_counts_and_passes_of_a_whole_run() -> None:
    steps, last = Process(fresh(5), 3, 2).run()
    first, end = 0, IntervalState.from_json(last)
    for d, (name, size) in enumerate(SIZES.items()):
        draws = [n - first for _, _, ids in steps for n in ids if first <= n < first + size]
        assert len(draws) == end.drawn[d]
        for begin_of_pass in range(0, len(draws), size):
            one_pass = draws[begin_of_pass : begin_of_pass + size]
            assert len(set(one_pass)) == len(one_pass), f"{name}: a repeat inside a pass"
        first += size
    assert end.drawn[0] == SIZES["code"]  # exactly at its cap


def test_a_lost_and_a_repeated_sample_would_be_seen() -> None:
    assert lost_and_repeated([1, 2, 2, 4], [1, 2, 3, 4]) == (1, 1)
    assert lost_and_repeated([1, 1, 2], [1, 1, 2]) == (0, 0)
    with pytest.raises(AssertionError, match="do not divide into 5 ranks"):
        Process(fresh(1), 5, 2).run()
