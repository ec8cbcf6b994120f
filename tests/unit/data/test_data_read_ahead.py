"""A node fetches shards before the training reads them."""

from __future__ import annotations

import time
from pathlib import Path

from ddk_ds.data.cache import CachedStore, CacheOptions
from ddk_ds.data.loader import MixtureDataset
from ddk_ds.data.store import LocalStore
from ddk_ds.mixture.interval_state import IntervalState, interval_ids
from ddk_ds.mixture.order import DomainOrder
from ddk_ds.train.read_ahead import ReadAhead

NAMES = ["large", "small", "tree"]


def test_the_next_draws_are_fetched_while_the_models_are_evaluated(prepared: Path, tmp_path: Path) -> None:
    store = CachedStore(str(prepared), CacheOptions(tmp_path / "cache", None, 20.0, 0))
    dataset = MixtureDataset(store, NAMES)
    orders = [DomainOrder(name, sizes, seed=0) for name, sizes in zip(NAMES, dataset.shard_sizes, strict=True)]
    entries = [{"name": name, "num_samples": int(n), "sha": ""} for name, n in zip(NAMES, dataset.sizes, strict=True)]
    state = IntervalState.new(entries, seed=0)  # type: ignore[arg-type]
    ahead = ReadAhead(store, dataset, orders, enabled=True)
    ahead.border(state, 6)
    wanted = {shard.name for _, shard in dataset.first_uses(dataset.sample_offsets)}
    deadline = time.monotonic() + 20
    while len(list((tmp_path / "cache/data").rglob("*.mds"))) < len(wanted) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert {
        str(file.relative_to(tmp_path / "cache/data")) for file in (tmp_path / "cache/data").rglob("*.mds")
    } == wanted
    state = state.advance([0.5, 0.25, 0.25], 8)
    ahead.interval(interval_ids(orders, dataset.sample_offsets, state), 0)
    ahead.advance(8)
    ahead.close()


def test_nothing_is_fetched_of_local_data_or_on_a_nodes_other_ranks(prepared: Path, tmp_path: Path) -> None:
    dataset = MixtureDataset(prepared, NAMES)
    cached = CachedStore(str(prepared), CacheOptions(tmp_path / "cache", None, 20.0, 0))
    for store, enabled in ((LocalStore(prepared), True), (cached, False)):
        ahead = ReadAhead(store, dataset, [], enabled=enabled)
        ahead.interval(dataset.sample_offsets, 0)
        ahead.close()
    assert not list((tmp_path / "cache/data").rglob("*.mds"))
