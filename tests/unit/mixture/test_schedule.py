"""The data order: exact counts, passes without repeats, the same ids after a resume."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_ds.errors import CheckpointError, ConfigError, DataError
from ddk_ds.mixture import DomainEntry, DomainOrder, IntervalState, ids_sha, interval_ids, largest_remainder

checked = settings(max_examples=50, deadline=None, derandomize=True)

SHARDS = {"web": (7, 0, 5, 9), "code": (4, 4), "math": (3, 1, 6)}
PROPORTIONS = ((0.5, 0.3, 0.2), (0.1, 0.1, 0.8), (0.0, 1.0, 0.0))
TOTAL = 40
seeds = st.integers(0, 2**64 - 1)
shard_lists = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)


def make_orders(names: tuple[str, ...], seed: int = 3, block: int = 4) -> list[DomainOrder]:
    return [DomainOrder(name, SHARDS[name], seed, block) for name in names]


def make_state(names: tuple[str, ...], seed: int = 3, block: int = 4) -> IntervalState:
    entries = [DomainEntry(name=name, num_samples=sum(SHARDS[name]), sha=f"sha-{name}") for name in names]
    return IntervalState.new(entries, seed=seed, block=block)


def sample_offsets(names: tuple[str, ...]) -> list[int]:
    return [1000 * tuple(SHARDS).index(name) for name in names]


def run_intervals(state: IntervalState, names: tuple[str, ...], first: int = 0) -> list[list[int]]:
    """Ids of the intervals from `first` on, from a fresh set of orders."""
    orders, ids = make_orders(names), []
    for proportions in PROPORTIONS[first:]:
        state = state.advance(proportions, TOTAL)
        ids.append(interval_ids(orders, sample_offsets(names), state).tolist())
        state = state.consume(TOTAL)
    return ids


@checked
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20).filter(any), st.integers(0, 10**6))
def test_counts_are_exact(weights: list[int], total: int) -> None:
    proportions = np.array(weights) / sum(weights)
    counts = largest_remainder(proportions, total)
    assert counts.dtype == np.int64
    assert counts.sum() == total
    assert (counts >= 0).all()
    assert (np.abs(counts - proportions * total) < 1).all()


def test_ties_go_to_the_lower_index() -> None:
    assert largest_remainder([0.25] * 4, 6).tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize("proportions", [[0.5, 0.4], [1.5, -0.5], [float("nan"), 1.0]])
def test_bad_proportions_are_refused(proportions: list[float]) -> None:
    with pytest.raises(ConfigError, match="proportions are"):
        largest_remainder(proportions, 8)


def test_negative_total_is_refused() -> None:
    with pytest.raises(ConfigError, match="-1 samples an interval"):
        largest_remainder([1.0], -1)


@checked
@given(shard_lists, seeds, st.integers(1, 30), st.integers(0, 3))
def test_a_pass_is_a_permutation(shards: list[int], seed: int, block: int, number: int) -> None:
    order = DomainOrder("web", shards, seed, block)
    size = sum(shards)
    assert order.num_samples == size
    drawn = order.take(number * size, (number + 1) * size)
    assert sorted(drawn.tolist()) == list(range(size))


@checked
@given(shard_lists, seeds, st.integers(1, 30), st.lists(st.integers(0, 120), min_size=2, max_size=6))
def test_take_equals_joined_takes(shards: list[int], seed: int, block: int, cuts: list[int]) -> None:
    cuts.sort()
    whole = DomainOrder("web", shards, seed, block).take(cuts[0], cuts[-1])
    order = DomainOrder("web", shards, seed, block)
    ends = list(itertools.pairwise(cuts))
    parts = {start: order.take(start, stop) for start, stop in reversed(ends) if start < stop}
    joined = [sample for start in sorted(parts) for sample in parts[start].tolist()]
    assert whole.tolist() == joined


def test_passes_seeds_and_names_differ() -> None:
    order = DomainOrder("web", [50, 50], 1, 10)
    first = order.take(0, 100).tolist()
    assert first != order.take(100, 200).tolist()
    assert first != DomainOrder("web", [50, 50], 2, 10).take(0, 100).tolist()
    assert first != DomainOrder("code", [50, 50], 1, 10).take(0, 100).tolist()


def test_few_shards_are_in_use_at_a_time() -> None:
    order = DomainOrder("web", [10] * 20, 1, block=30)
    for cursor in range(0, 170, 7):
        assert len(order.shards_of(cursor, cursor + 30)) <= 6  # two blocks of three shards
    assert sorted(order.shards_of(0, 200).tolist()) == list(range(20))


def test_shards_are_in_the_order_of_use() -> None:
    order = DomainOrder("web", [5, 5, 5], 2, block=5)
    in_order = [int(order.take(start, start + 1)[0]) // 5 for start in (0, 5, 10)]
    assert order.shards_of(0, 15).tolist() == in_order


@pytest.mark.parametrize("shards", [[], [0, 0], [5, -1]])
def test_domain_without_samples_is_refused(shards: list[int]) -> None:
    with pytest.raises(DataError, match="domain 'web'"):
        DomainOrder("web", shards, 1)


@pytest.mark.parametrize(("seed", "block", "message"), [(-1, 4, "seed"), (2**64, 4, "seed"), (1, 0, "block")])
def test_bad_seed_or_block_is_refused(seed: int, block: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message} is"):
        DomainOrder("web", [5], seed, block)
    with pytest.raises(ConfigError, match=f"{message} is"):
        make_state(("web",), seed, block)


def test_intervals_draw_counts_and_repeat_nothing_inside_a_pass() -> None:
    names = tuple(SHARDS)
    offsets, sizes = sample_offsets(names), [sum(SHARDS[name]) for name in names]
    intervals = run_intervals(make_state(names), names)
    for ids, proportions in zip(intervals, PROPORTIONS, strict=True):
        counts = np.bincount(np.array(ids) // 1000, minlength=3)
        assert counts.tolist() == largest_remainder(proportions, TOTAL).tolist()
    everything = [sample for ids in intervals for sample in ids]
    for offset, size in zip(offsets, sizes, strict=True):
        drawn = [sample - offset for sample in everything if sample // 1000 == offset // 1000]
        for start in range(0, len(drawn), size):
            draws = drawn[start : start + size]
            assert len(set(draws)) == len(draws)
            assert set(draws) <= set(range(size))


def test_domains_are_mixed_over_the_interval() -> None:
    names = tuple(SHARDS)
    first = run_intervals(make_state(names), names)[0]
    labels = [sample // 1000 for sample in first]
    assert labels != sorted(labels)
    assert set(labels[: TOTAL // 2]) == {0, 1, 2}


@checked
@given(st.integers(0, 2), st.integers(0, TOTAL), seeds)
def test_resume_from_json_gives_the_same_ids(stop: int, consumed: int, seed: int) -> None:
    names = tuple(SHARDS)
    state, orders = make_state(names, seed), make_orders(names, seed)
    for proportions in PROPORTIONS[:stop]:
        state = state.advance(proportions, TOTAL).consume(TOTAL)
    state = state.advance(PROPORTIONS[stop], TOTAL)
    ids = interval_ids(orders, sample_offsets(names), state)
    state = state.seal(ids).consume(consumed)
    resumed = IntervalState.from_json(json.loads(json.dumps(state.to_json())))
    assert resumed == state
    again = interval_ids(make_orders(names, seed), sample_offsets(names), resumed)
    assert again.tolist() == ids.tolist()
    assert resumed.seal(again) == resumed
    following = resumed.consume(TOTAL - consumed).advance(PROPORTIONS[0], TOTAL)
    assert following == state.consume(TOTAL - consumed).advance(PROPORTIONS[0], TOTAL)


def test_intervals_after_a_resume_are_those_of_the_run_without_one() -> None:
    names = tuple(SHARDS)
    whole = run_intervals(make_state(names), names)
    state = make_state(names).advance(PROPORTIONS[0], TOTAL).consume(TOTAL)
    resumed = IntervalState.from_json(state.to_json())
    assert run_intervals(resumed, names, first=1) == whole[1:]


@checked
@given(seeds, st.integers(1, 30))
def test_adding_a_domain_leaves_the_draws_of_the_others(seed: int, total: int) -> None:
    drawn = []
    for names, proportions in ((("web", "code"), (0.5, 0.5)), (("math", "web", "code"), (0.5, 0.25, 0.25))):
        state = make_state(names, seed).advance(proportions, total * len(names) * (len(names) - 1))
        ids = interval_ids(make_orders(names, seed), sample_offsets(names), state)
        drawn.append({name: ids[ids // 1000 == tuple(SHARDS).index(name)].tolist() for name in SHARDS})
    for name in ("web", "code"):
        shorter = min(len(drawn[0][name]), len(drawn[1][name]))
        assert shorter > 0
        assert drawn[0][name][:shorter] == drawn[1][name][:shorter]


def test_state_keeps_count() -> None:
    state = make_state(("web", "code"))
    assert (state.interval, state.total, state.done) == (-1, 0, True)
    state = state.advance([0.75, 0.25], 8)
    assert (state.interval, state.counts, state.cursors, state.done) == (0, (6, 2), (0, 0), False)
    state = state.consume(5)
    assert (state.consumed, state.done) == (5, False)
    state = state.consume(3)
    assert state.done
    state = state.advance([0.5, 0.5], 4)
    assert (state.interval, state.cursors, state.history) == (1, (6, 2), ((6, 2),))
    assert (state.consumed, state.ids_sha) == (0, "")


def test_an_unfinished_interval_cannot_be_left_nor_overrun() -> None:
    state = make_state(("web",)).advance([1.0], 8)
    with pytest.raises(AssertionError, match="0 of 8 samples behind it"):
        state.advance([1.0], 8)
    with pytest.raises(AssertionError, match="9 of 8 samples consumed"):
        state.consume(9)


def test_seal_refuses_another_order() -> None:
    names = tuple(SHARDS)
    state = make_state(names).advance(PROPORTIONS[0], TOTAL)
    ids = interval_ids(make_orders(names), sample_offsets(names), state)
    sealed = state.seal(ids)
    assert sealed.ids_sha == ids_sha(ids)
    with pytest.raises(CheckpointError, match="interval 0: the sample order is"):
        sealed.seal(ids[::-1])


def test_hash_of_ids_is_that_of_little_endian_int64() -> None:
    ids = np.arange(5)
    assert ids_sha(ids) == ids_sha(ids.astype(">i8")) == ids_sha(np.arange(10)[::2] // 2)
    assert len(ids_sha(ids)) == 16
    assert ids_sha(ids) != ids_sha(ids[:4])


@pytest.mark.parametrize("algorithm", ["ddk-interval/2", None])
def test_from_json_refuses_another_algorithm(algorithm: str | None) -> None:
    record: dict[str, Any] = {**make_state(("web",)).to_json(), "algorithm": algorithm}
    with pytest.raises(CheckpointError, match=f"data order is '{algorithm}'"):
        IntervalState.from_json(record)


def test_from_json_refuses_missing_and_unknown_fields() -> None:
    record = make_state(("web",)).to_json()
    with pytest.raises(CheckpointError, match=r"unknown fields: \['extra'\]"):
        IntervalState.from_json({**record, "extra": 1})
    del record["cursors"]
    with pytest.raises(CheckpointError, match=r"unknown fields: \['cursors'\]"):
        IntervalState.from_json(record)


def test_a_state_of_other_data_is_refused() -> None:
    saved = make_state(("web", "code")).advance([0.5, 0.5], 4)
    saved.check_fits(make_state(("web", "code")))
    for key, fresh in (
        ("seed", make_state(("web", "code"), seed=4)),
        ("block", make_state(("web", "code"), block=5)),
        ("domains", make_state(("web", "math"))),
    ):
        with pytest.raises(CheckpointError, match=f"data order has {key} "):
            saved.check_fits(fresh)


@pytest.mark.parametrize("names", [(), ("web", "web")])
def test_bad_domains_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="at least one, each once"):
        make_state(names)
