"""Planning an interval of 1,024,000 samples over 1,000 domains takes at most 2 s and 100 MB."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest

from ddk_ds.mixture.interval_state import DomainEntry, IntervalState, interval_ids
from ddk_ds.mixture.order import DomainOrder
from tests.unit.mixture.mixture_section import exhaustion_of

TOTAL = 1_024_000
# Processor time, so that other work on the machine does not count: 0.1 to 1.1 s on one core of a small virtual machine.
# The limit is three times the promise, for slow machines.
SECONDS, MEGABYTES = 6.0, 100.0


def plan(num_domains: int, samples: int, shard: int) -> IntervalState:
    """Plan a first interval by uneven proportions, up to its sample ids."""
    names = [f"domain{i}" for i in range(num_domains)]
    state = IntervalState.new([DomainEntry(name=name, num_samples=samples, sha="0" * 16) for name in names], seed=1)
    orders = [DomainOrder(name, [shard] * (samples // shard), 1) for name in names]
    proportions = np.random.default_rng(0).dirichlet(np.ones(num_domains))
    capped = exhaustion_of(dict.fromkeys(names, samples), exhaustion="cap", max_passes=100)  # no cap is reached
    draws = capped.draws(proportions, TOTAL, state.drawn, state.owed)
    state = state.begin(draws.counts, draws.owed)
    ids = interval_ids(orders, np.arange(num_domains) * samples, state)
    assert len(ids) == TOTAL == state.total
    return state.seal(ids)


@pytest.mark.parametrize(
    ("num_domains", "samples", "shard", "sha"),
    [
        (10, 1_000_000, 2000, "bda8dbcf325958ab"),
        (100, 100_000, 500, "b6b0f5847f35323c"),
        (1000, 2000, 500, "bec80961df64fa32"),
        (1000, 100_000, 500, "9e2573a7a7b5cd2f"),  # the largest cost: a block of each domain is shuffled
        pytest.param(
            *(1000, 1_000_000, 2000, "05e86d3500d5760b"),
            marks=pytest.mark.long("5 s; the case above is the costliest of a domain"),
        ),
    ],
)
def test_an_interval_is_planned_fast_and_small(num_domains: int, samples: int, shard: int, sha: str) -> None:
    started = time.process_time()
    state = plan(num_domains, samples, shard)
    seconds = time.process_time() - started
    tracemalloc.start()
    try:
        assert plan(num_domains, samples, shard) == state
        peak_mb = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    assert state.ids_sha == sha  # the order must not change when planning gets faster
    assert seconds < SECONDS, f"{seconds:.2f} s"
    assert peak_mb < MEGABYTES, f"{peak_mb:.0f} MB"
