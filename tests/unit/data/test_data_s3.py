"""Prepared data in S3: the same samples, one request a shard and node, failing requests, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddk_ds.data import remote as fetch_module
from ddk_ds.data.cache import CachedStore, CacheOptions
from ddk_ds.data.loader import MixtureDataset, interval_loader
from ddk_ds.data.manifest import load_manifest
from ddk_ds.errors import DataError
from tests.s3_server import ENVIRONMENT, S3Server

NAMES = ["large", "small", "tree"]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "_FIRST_WAIT_S", 0.01)


def node(url: str, directory: Path, retries: int = 4) -> MixtureDataset:
    return MixtureDataset(CachedStore(url, CacheOptions(directory, None, 20.0, retries)), NAMES)


@pytest.mark.parametrize("fail_every", [0, 10])
def test_two_nodes_read_the_order_of_the_local_data(
    s3: S3Server, prepared: Path, tmp_path: Path, fail_every: int
) -> None:
    url = s3.upload(prepared, "data/v1")
    s3.fail_every = fail_every
    local = MixtureDataset(prepared, NAMES)
    ids = np.random.default_rng(0).permutation(len(local))[: len(local) // 8 * 8]
    expected = list(interval_loader(local, ids, rank=0, world=1, micro_batch=4))
    found: list[list[int]] = []
    for rank in range(4):  # two ranks on each of two nodes, the second of them with a worker
        dataset = node(url, tmp_path / f"node{rank // 2}")
        batches = interval_loader(dataset, ids, rank=rank, world=4, micro_batch=2, num_workers=rank % 2)
        found.append([batch["input_ids"].tolist() for batch in batches])
    together = [row for step in zip(*found, strict=True) for batch in step for row in batch]
    assert together == [row for batch in expected for row in batch["input_ids"].tolist()]
    shards = {key: count for key, count in s3.got.items() if key.endswith("mds")}
    assert shards and set(shards.values()) == {2}  # once on each node


def test_missing_and_denied_files_are_named(s3: S3Server, prepared: Path, tmp_path: Path) -> None:
    url = s3.upload(prepared, "data")
    with pytest.raises(DataError, match=r"s3://corpus/other/domains\.json does not exist; check the address"):
        load_manifest(CachedStore("s3://corpus/other", CacheOptions(tmp_path / "a", None, 20.0, 4)))
    s3.deny = True
    with pytest.raises(DataError, match=r"domains\.json: access is denied \(403\)") as error:
        load_manifest(CachedStore(url, CacheOptions(tmp_path / "b", None, 20.0, 4)))
    assert ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in str(error.value)


def test_an_error_of_a_store_that_is_down_names_the_shard(
    s3: S3Server, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = node(s3.upload(prepared, "data"), tmp_path / "cache", retries=1)
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    dataset._splits[0]._store.fetcher._downloaders.clear()  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"s3://corpus/data/large/train/shard\.\d+\.mds of domain 'large' cannot be"):
        dataset[0]
