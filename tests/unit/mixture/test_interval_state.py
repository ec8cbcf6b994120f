"""The data order: exact counts, no repeat inside a pass, independence of domains, resumption."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_ds.errors import CheckpointError, ConfigError, DataError
from ddk_ds.mixture.exhaustion import largest_remainder
from ddk_ds.mixture.interval_state import DomainEntry, IntervalState, ids_sha, interval_ids
from ddk_ds.mixture.order import MIX, SAMPLES, DomainOrder, philox

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


def entries(*num_samples: int) -> list[DomainEntry]:
    return [DomainEntry(name=f"domain{i}", num_samples=n, sha=f"{i:04x}") for i, n in enumerate(num_samples)]


def make(*num_samples: int, seed: int = 3) -> tuple[list[DomainOrder], np.ndarray, IntervalState]:
    """Return orders over shards of about 100 samples, their offsets, and a fresh state."""
    state = IntervalState.new(entries(*num_samples), seed=seed, block=256)
    orders = []
    for domain in state.domains:
        full, rest = divmod(domain["num_samples"], 100)
        orders.append(DomainOrder(domain["name"], [100] * full + [rest], seed, block=256))
    return orders, np.cumsum(num_samples) - num_samples, state


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any), st.integers(0, 10**9))
def test_counts_are_exact(weights: list[int], total: int) -> None:
    proportions = np.array(weights) / sum(weights)
    counts = largest_remainder(proportions, total)
    assert counts.dtype == np.int64
    assert counts.sum() == total
    assert (np.abs(counts - proportions * total) < 1 + 1e-6).all()
    assert (counts[proportions == 0] == 0).all()


def test_ties_go_to_the_lower_index() -> None:
    assert largest_remainder([0.25] * 4, 6).tolist() == [2, 2, 1, 1]
    assert largest_remainder([1 / 40] * 40, 10).tolist() == [1] * 10 + [0] * 30
    assert largest_remainder([0.5, 0.3, 0.2], 1).tolist() == [1, 0, 0]
    assert largest_remainder([0.1, 0.45, 0.45], 10).tolist() == [1, 5, 4]


@pytest.mark.parametrize("proportions", [[0.5, 0.6], [1.2, -0.2], [float("nan"), 1.0]])
def test_bad_proportions_are_refused(proportions: list[float]) -> None:
    with pytest.raises(ConfigError, match="proportions are"):
        largest_remainder(proportions, 10)
    with pytest.raises(ConfigError, match="-1 samples"):
        largest_remainder([1.0], -1)


@settings(deadline=None)
@given(shard_sizes, st.integers(0, 2**64 - 1), st.integers(1, 60), st.integers(0, 5))
def test_each_pass_holds_every_sample_once(sizes: list[int], seed: int, block: int, number: int) -> None:
    order = DomainOrder("prose", sizes, seed, block)
    n = order.num_samples
    assert n == sum(sizes)
    assert sorted(order.take(number * n, (number + 1) * n).tolist()) == list(range(n))


@settings(deadline=None)
@given(shard_sizes, st.integers(1, 60), st.lists(st.integers(0, 150), min_size=1, max_size=6))
def test_consecutive_takes_are_one_take(sizes: list[int], block: int, steps: list[int]) -> None:
    cuts = np.cumsum([0, *steps]).tolist()
    whole = DomainOrder("prose", sizes, 5, block).take(0, cuts[-1])
    order = DomainOrder("prose", sizes, 5, block)
    parts = [order.take(a, b) for a, b in itertools.pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(order.take(0, cuts[1]), parts[0])  # an earlier take gives the same draws again
    assert whole.dtype == np.int64


@settings(deadline=None)
@given(shard_sizes, st.integers(1, 60))
def test_few_shards_are_in_use_at_once(sizes: list[int], block: int) -> None:
    order = DomainOrder("prose", sizes, 5, block)
    ids = order.take(0, order.num_samples)
    shards = np.searchsorted(np.cumsum(sizes), ids, "right")
    # A block ends with the shard that fills it, so all draws of a shard lie within block + one shard of samples.
    for shard in np.unique(shards):
        draws = np.flatnonzero(shards == shard)
        assert draws[-1] - draws[0] < block + max(sizes)
    np.testing.assert_array_equal(order.shards_of(0, len(ids)), list(dict.fromkeys(shards.tolist())))


def test_passes_seeds_and_names_differ() -> None:
    def draws(name: str = "prose", seed: int = 1, number: int = 0) -> list[int]:
        return DomainOrder(name, [300] * 4, seed).take(number * 1200, number * 1200 + 1200).tolist()

    orders = [draws(), draws(number=1), draws(seed=2), draws(seed=1 << 32), draws(name="code"), draws(name="")]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert draws() == draws()
    # Mixed across shards, not shard by shard.
    assert len(set(np.array(draws())[:100] // 300)) == 4


def test_the_order_is_the_one_that_checkpoints_were_written_with() -> None:
    """Another hash means that older runs cannot be resumed: it needs a new ALGORITHM."""
    orders, offsets, state = make(250, 1000, 40)
    state = state.advance([0.2, 0.5, 0.3], 200)
    assert state.counts == (40, 100, 60)
    assert ids_sha(interval_ids(orders, offsets, state)) == "eb5cb86a940ff25c"


def test_random_streams_are_numpys_philox_of_all_64_bits_of_their_values() -> None:
    """Seed and name's key as two 32-bit words each, low word first, then purpose, number and block."""
    seed, key = 0x8123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210
    words = [0x89AB_CDEF, 0x8123_4567, 0x7654_3210, 0xFEDC_BA98, 1, 7, 5]
    theirs = np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
    assert philox(seed, key, SAMPLES, 7, 5).integers(0, 2**63, 8).tolist() == theirs.integers(0, 2**63, 8).tolist()
    words[-3:] = [2, 9, 0]
    theirs = np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
    assert philox(seed, key, MIX, 9).integers(0, 2**63, 8).tolist() == theirs.integers(0, 2**63, 8).tolist()


def test_a_shuffles_block_is_2_to_the_16_samples() -> None:
    """Another number would be another order: a checkpoint of an earlier version could not be resumed."""
    assert IntervalState.new(entries(5), seed=1).block == 65536 == DomainOrder("prose", [5], 1).block


@pytest.mark.parametrize(("sizes", "message"), [([], "0 training samples"), ([0, 0], "0"), ([5, -1], "4")])
def test_an_empty_domain_is_refused(sizes: list[int], message: str) -> None:
    with pytest.raises(DataError, match=f"domain 'prose' has {message}"):
        DomainOrder("prose", sizes, 1)


@settings(deadline=None)
@given(st.data())
def test_intervals_follow_their_plan(data: st.DataObject) -> None:
    orders, offsets, state = make(250, 1000, 40)
    drawn: list[list[int]] = [[], [], []]
    for _ in range(data.draw(st.integers(1, 4))):
        weights = np.array(data.draw(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)))
        total = data.draw(st.integers(0, 400))
        state = state.advance(weights / weights.sum(), total)
        ids = interval_ids(orders, offsets, state)
        domains = np.searchsorted(offsets, ids, "right") - 1
        assert ids.shape == (total,)
        assert np.bincount(domains, minlength=3).tolist() == list(state.counts)
        for d in range(3):
            drawn[d] += (ids[domains == d] - offsets[d]).tolist()
        state = state.consume(total)
    # Whatever the proportions were, each domain went through its own sequence, in order, without a gap.
    for d in range(3):
        assert drawn[d] == orders[d].take(0, len(drawn[d])).tolist()


def test_an_interval_owes_what_its_counts_leave() -> None:
    _, _, state = make(1000, 1000)
    first = state.advance([0.25, 0.75], 3)  # due 0.75 and 2.25
    assert first.counts == (1, 2) and first.owed == pytest.approx((-0.25, 0.25))
    second = replace(first, consumed=3).advance([0.25, 0.75], 2)  # due 0.5 - 0.25 and 1.5 + 0.25
    assert second.counts == (0, 2) and second.owed == pytest.approx((0.25, -0.25))


def test_an_interval_is_mixed() -> None:
    orders, offsets, state = make(1000, 1000)
    ids = interval_ids(orders, offsets, state.advance([0.5, 0.5], 1000))
    assert 200 < (ids[:500] < 1000).sum() < 300


def test_a_domain_that_runs_out_starts_a_new_pass() -> None:
    orders, offsets, state = make(50, 1000)
    ids = interval_ids(orders, offsets, state.advance([0.75, 0.25], 200))
    first, second, third = np.split(ids[ids < 50], 3)
    for draws in (first, second, third):
        assert sorted(draws.tolist()) == list(range(50))
    assert first.tolist() != second.tolist() != third.tolist()


def test_another_domain_leaves_the_draws_of_the_rest() -> None:
    orders, offsets, state = make(300, 400)
    more_orders, more_offsets, more_state = make(300, 400, 500)
    ids = interval_ids(orders, offsets, state.advance([0.5, 0.5], 300))
    more = interval_ids(more_orders, more_offsets, more_state.advance([0.3, 0.3, 0.4], 500))
    assert more_offsets[:2].tolist() == offsets.tolist()
    for low, high in ((0, 300), (300, 700)):
        assert ids[(ids >= low) & (ids < high)].tolist() == more[(more >= low) & (more < high)].tolist()


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(0, 300))
def test_a_run_resumes_from_json(interval: int, consumed: int) -> None:
    proportions = [[0.2, 0.8], [0.5, 0.5], [0.9, 0.1], [1.0, 0.0], [0.3, 0.7]]

    def play(state: IntervalState, stop_at: tuple[int, int] | None) -> tuple[list[int], IntervalState]:
        orders, offsets, _ = make(250, 1000)
        seen: list[int] = []
        while True:
            if state.done:
                if state.interval == len(proportions) - 1:
                    return seen, state
                state = state.advance(proportions[state.interval + 1], 300)
            ids = interval_ids(orders, offsets, state)
            state = state.seal(ids)
            end = state.total
            if stop_at is not None and stop_at[0] == state.interval:
                end = stop_at[1]
            seen += ids[state.consumed : end].tolist()
            state = state.consume(end - state.consumed)
            if end < state.total or (stop_at is not None and stop_at[0] == state.interval):
                return seen, state

    whole, last = play(make(250, 1000)[2], None)
    head, stopped = play(make(250, 1000)[2], (interval, consumed))
    tail, resumed = play(IntervalState.from_json(json.loads(json.dumps(stopped.to_json()))), None)
    assert head + tail == whole
    assert resumed == last


def test_the_record_is_small_plain_json() -> None:
    state = IntervalState.new(entries(*[10**6] * 10), seed=1)
    for _ in range(3000):
        state = state.advance([0.1] * 10, 512_000).consume(512_000)
    record = state.to_json()
    assert json.loads(json.dumps(record)) == record
    assert len(json.dumps(record)) < 2500
    assert IntervalState.from_json(record) == state
    assert state.cursors == (2999 * 51_200,) * 10
    assert state.drawn == (3000 * 51_200,) * 10
    assert state.history == ((51_200,) * 10,) * 4


def test_the_hash_of_the_history_covers_every_past_interval() -> None:
    def play(*first_counts: int) -> IntervalState:
        state = make(250, 1000)[2]
        for first in first_counts:
            state = state.begin([first, 100 - first], [0.0, 0.0]).consume(100)
        return state

    long = play(50, 10, 20, 30, 40, 50, 60)
    assert long.history == ((20, 80), (30, 70), (40, 60), (50, 50))
    other = play(50, 20, 10, 30, 40, 50, 60)  # the same sums, and the same but for the second and third
    assert (other.cursors, other.counts) == (long.cursors, long.counts)
    assert other.history_sha != long.history_sha
    assert play(50, 10, 20, 30, 40, 50, 60) == long
    assert play().history_sha == play(50).history_sha == ""
    first = hashlib.sha256(b" 50 50").hexdigest()[:16]
    assert play(50, 10).history_sha == first
    assert play(50, 10, 20).history_sha == hashlib.sha256(f"{first} 10 90".encode()).hexdigest()[:16]


def test_a_record_with_other_fields_is_refused() -> None:
    record = make(250, 1000)[2].to_json()
    other = {key: value for key, value in record.items() if key != "history_sha"}
    with pytest.raises(CheckpointError, match=r"missing or unknown fields: \['history_sha'\]"):
        IntervalState.from_json(other)


def test_a_changed_order_is_caught() -> None:
    orders, offsets, state = make(250, 1000)
    ids = interval_ids(orders, offsets, state.advance([0.5, 0.5], 100))
    state = state.advance([0.5, 0.5], 100).seal(ids)
    assert state.ids_sha == ids_sha(ids)
    assert IntervalState.from_json(state.to_json()).seal(ids) == state
    swapped = ids[[1, 0, *range(2, 100)]]
    with pytest.raises(CheckpointError, match=f"interval 0: the sample order is {ids_sha(swapped)}"):
        state.seal(swapped)
    assert state.consume(100).advance([0.5, 0.5], 10).ids_sha == ""


def test_the_sha_is_of_the_values_alone() -> None:
    ids = np.arange(7)
    assert ids_sha(ids) == ids_sha(ids.astype(">i8")) == ids_sha(np.repeat(ids, 2)[::2])
    assert ids_sha(ids) == hashlib.sha256(struct.pack("<7q", *range(7))).hexdigest()[:16]
    assert ids_sha(ids) != ids_sha(ids[::-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "ddk-interval/0"}, "data order is 'ddk-interval/0'"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_a_foreign_record_is_refused(change: dict[str, Any], message: str) -> None:
    record = make(250)[2].to_json()
    with pytest.raises(CheckpointError, match=message):
        IntervalState.from_json({**record, **change})
    del record["cursors"]
    with pytest.raises(CheckpointError, match="cursors"):
        IntervalState.from_json(record)


def test_a_checkpoint_of_other_data_is_refused() -> None:
    state = make(250, 1000)[2]
    state.check_fits(IntervalState.from_json(make(250, 1000)[2].to_json()))
    later = state.advance([0.5, 0.5], 10)
    later.check_fits(state)
    with pytest.raises(CheckpointError, match="seed 3, this run 4"):
        later.check_fits(make(250, 1000, seed=4)[2])
    with pytest.raises(CheckpointError, match="has domains"):
        later.check_fits(make(250, 1001)[2])
    with pytest.raises(CheckpointError, match="has block 256, this run 128"):
        later.check_fits(replace(state, block=128))


def test_bad_settings_are_refused() -> None:
    for seed in (-1, 2**64):
        with pytest.raises(ConfigError, match="seed is"):
            IntervalState.new(entries(5), seed=seed)
        with pytest.raises(ConfigError, match="seed is"):
            DomainOrder("prose", [5], seed)
    with pytest.raises(ConfigError, match="block is 0"):
        DomainOrder("prose", [5], 1, block=0)
    with pytest.raises(ConfigError, match="each once"):
        IntervalState.new([*entries(5), *entries(6)], seed=1)
    with pytest.raises(ConfigError, match="at least one"):
        IntervalState.new([], seed=1)


def test_our_own_mistakes_are_asserted() -> None:
    state = make(250, 1000)[2].advance([0.5, 0.5], 10)
    with pytest.raises(AssertionError, match="0 of 10 samples"):
        state.advance([0.5, 0.5], 10)
    with pytest.raises(AssertionError, match="11 of 10 samples"):
        state.consume(11)
    with pytest.raises(AssertionError, match="3 for 2 domains"):
        state.consume(10).begin([5, 3, 2], [0.0] * 3)
