"""Prepared data in S3: the same samples, one request a shard and node, failing requests, and refusals."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from ddk_ds.data import patience
from ddk_ds.data.cache import CachedStore, CacheOptions
from ddk_ds.data.loader import MixtureDataset, interval_loader
from ddk_ds.data.manifest import load_manifest
from ddk_ds.errors import DataError, TemporaryError
from tests.s3_server import ENVIRONMENT, S3Server

NAMES = ["large", "small", "tree"]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_FIRST_WAIT_S", 0.01)


def node(url: str, directory: Path, patience_s: float = 600.0) -> MixtureDataset:
    return MixtureDataset(CachedStore(url, CacheOptions(directory, None, 20.0, patience_s)), NAMES)


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
    for rank in range(4):  # two ranks on each of two nodes
        dataset = node(url, tmp_path / f"node{rank // 2}")
        batches = interval_loader(dataset, ids, rank=rank, world=4, micro_batch=2)
        found.append([batch["input_ids"].tolist() for batch in batches])
    together = [row for step in zip(*found, strict=True) for batch in step for row in batch]
    assert together == [row for batch in expected for row in batch["input_ids"].tolist()]
    shards = {key: count for key, count in s3.got.items() if key.endswith("mds")}
    assert shards and set(shards.values()) == {2}  # once on each node


def test_missing_and_denied_files_are_named(s3: S3Server, prepared: Path, tmp_path: Path) -> None:
    url = s3.upload(prepared, "data")
    with pytest.raises(DataError, match=r"s3://corpus/other/domains\.json does not exist; check the address"):
        load_manifest(CachedStore("s3://corpus/other", CacheOptions(tmp_path / "a", None, 20.0, 600.0)))
    s3.deny = True
    with pytest.raises(DataError, match=r"domains\.json: access is denied \(403\)") as error:
        load_manifest(CachedStore(url, CacheOptions(tmp_path / "b", None, 20.0, 600.0)))
    assert ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in str(error.value)


def test_an_error_of_a_store_that_is_down_names_the_shard(
    s3: S3Server, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = node(s3.upload(prepared, "data"), tmp_path / "cache", patience_s=0.1)
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    dataset._splits[0]._store.fetcher._downloaders.clear()  # type: ignore[attr-defined]
    with pytest.raises(
        TemporaryError, match=r"s3://corpus/data/large/train/shard\.\d+\.mds of domain 'large' cannot be"
    ):
        dataset[0]


def test_a_store_that_is_down_for_a_while_is_waited_for(
    s3: S3Server,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(patience, "_QUIET_S", 0.5)
    url, local = s3.upload(prepared, "data"), MixtureDataset(prepared, NAMES)
    dataset = node(url, tmp_path / "cache")
    s3.down = True
    threading.Timer(4.0, setattr, (s3, "down", False)).start()
    began = time.monotonic()
    assert (dataset[0]["input_ids"] == local[0]["input_ids"]).all()
    assert time.monotonic() - began >= 3.9
    said = [record for record in caplog.records if "cannot be fetched for" in record.message]
    assert len(said) == 1, "once a minute"
    assert re.search(r"s3://.*\.mds of domain 'large' .*503.*trying for 600 s", said[0].message)


def test_patience_has_an_end_and_is_shared_by_the_processes_that_wait(
    s3: S3Server, prepared: Path, tmp_path: Path
) -> None:
    datasets = [node(s3.upload(prepared, "data"), tmp_path / "cache", patience_s=3.0) for _ in range(2)]
    s3.down = True
    began = time.monotonic()

    def error(dataset: MixtureDataset) -> str:
        with pytest.raises(TemporaryError) as raised:
            dataset[0]
        return str(raised.value)

    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(error, datasets))
    took = time.monotonic() - began
    assert all("503" in message for message in errors), errors
    assert 3 <= took < 30, "the second waited for the first one's lock, and then tried once"


def test_a_store_that_goes_down_between_two_files_is_no_damage(s3: S3Server, prepared: Path, tmp_path: Path) -> None:
    url = s3.upload(prepared, "data")
    s3.breaks_at = "small/validation/index.json"
    with pytest.raises(TemporaryError, match=r"small/validation/index\.json cannot be fetched, tried for"):
        load_manifest(CachedStore(url, CacheOptions(tmp_path / "cache", None, 20.0, 0.5)))


def test_what_time_does_not_mend_ends_at_once(s3: S3Server, prepared: Path, tmp_path: Path) -> None:
    s3.upload(prepared, "data")
    for number, address in enumerate(("s3://no-such-bucket/data", "s3://corpus/nothing")):
        with pytest.raises(DataError, match=r"domains\.json does not exist"):
            load_manifest(CachedStore(address, CacheOptions(tmp_path / str(number), None, 20.0, 600.0)))


def test_a_signal_ends_the_patience(s3: S3Server, prepared: Path, tmp_path: Path) -> None:
    store = CachedStore(s3.upload(prepared, "data"), CacheOptions(tmp_path / "cache", None, 20.0, 600.0))
    dataset = MixtureDataset(store, NAMES)
    s3.down = True
    store.fetcher.give_up = lambda: True
    with pytest.raises(TemporaryError, match="503"):
        dataset[0]


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (ClientError({"ResponseMetadata": {"HTTPStatusCode": 503}}, "get"), False),
        (ClientError({"ResponseMetadata": {"HTTPStatusCode": 400}}, "get"), True),
        (ClientError({"ResponseMetadata": {"HTTPStatusCode": 429}}, "get"), False),
        (HTTPError("u", 410, "gone", Message(), None), True),
        (HTTPError("u", 502, "bad gateway", Message(), None), False),
        (EndpointConnectionError(endpoint_url="u"), False),
        (TimeoutError(), False),
    ],
    ids=repr,
)
def test_a_refusal_is_told_from_a_store_that_cannot_serve(error: Exception, final: bool) -> None:
    assert patience.refused(error) is final
