"""A cache of a teacher in S3: parts appear whole or not at all, and what a store does is told from damage."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest

from ddk_ds.config import Data
from ddk_ds.data import patience
from ddk_ds.data.cache import CachedStore, CacheOptions
from ddk_ds.data.loader import MixtureDataset
from ddk_ds.data.store import LocalStore, Shard
from ddk_ds.data.teacher_cache import TeacherCache, make_cache
from ddk_ds.data.teacher_place import RemotePlace, open_place
from ddk_ds.errors import ConfigError, DataError, TemporaryError
from ddk_ds.files import size_and_xxh64
from ddk_ds.methods import CachedTeacher
from ddk_ds.train.read_ahead import ReadAhead
from tests.s3_server import BUCKET, S3Server
from tests.unit.data.test_teacher_cache import CONDITIONS, SHAS, VOCAB, equal, said
from tests.unit.train.short_config import config_of

ADDRESS = f"s3://{BUCKET}/caches/teacher"


@pytest.fixture(autouse=True)
def _no_pauses(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    client().create_bucket(Bucket=BUCKET)
    for key in keys():  # the server's content outlives a test
        client().delete_object(Bucket=BUCKET, Key=key)


def client() -> Any:
    return boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])


def node(directory: Path, patience_s: float = 600.0, shas: dict[str, str] = SHAS) -> TeacherCache:
    """Open the cache on a node whose disk is `directory`."""
    data = Data(path=str(directory), cache_dir=str(directory), download_patience_s=patience_s, download_timeout_s=20.0)
    place = open_place(ADDRESS, data)
    make_cache(place, CONDITIONS)
    return TeacherCache(place, CONDITIONS, shas, VOCAB)


def keys() -> list[str]:
    return [entry["Key"] for entry in client().list_objects_v2(Bucket=BUCKET).get("Contents", ())]


def test_parts_of_several_nodes_join_and_a_shard_is_fetched_once_a_node(s3: S3Server, tmp_path: Path) -> None:
    writers = [node(tmp_path / f"node{number}") for number in range(2)]
    for number in range(20):
        writers[number % 2].add("web", number, said(number))
    for writer in writers:
        writer.publish()
    readers = [node(tmp_path / "node2") for _ in range(2)]  # two ranks of one node
    for reader in readers:
        assert reader.known("web").tolist() == list(range(20))
        assert all(equal(reader.read("web", number), said(number)) for number in range(20))
    assert {count for key, count in s3.got.items() if key.endswith(".mds")} == {1}
    writers[0].refresh()
    assert all(equal(writers[0].read("web", number), said(number)) for number in range(20))
    assert not [path for path in (tmp_path / "node0/writing").rglob("*") if path.is_file() and "parts" in path.parts]


@pytest.mark.parametrize("at", ["shard.00000.mds", "index.json", "samples.json"])
def test_an_upload_that_breaks_off_leaves_nothing_that_counts(s3: S3Server, tmp_path: Path, at: str) -> None:
    cache = node(tmp_path / "node", patience_s=0.1)
    cache.add("web", 3, said(3))
    s3.breaks_at = at
    with pytest.raises(TemporaryError, match=f"{ADDRESS}/parts/[0-9a-f]*/{at} cannot be uploaded, tried for .*503"):
        cache.publish()
    s3.breaks_at, s3.down = None, False
    assert len(node(tmp_path / "other").known("web")) == 0
    cache.publish()
    assert equal(node(tmp_path / "other").read("web", 3), said(3))


def test_a_store_that_is_down_for_a_while_is_waited_for(s3: S3Server, tmp_path: Path) -> None:
    cache = node(tmp_path / "node")
    cache.add("web", 3, said(3))
    s3.down = True
    threading.Timer(3.0, setattr, (s3, "down", False)).start()
    began = time.monotonic()
    cache.publish()
    assert time.monotonic() - began >= 2.9
    assert equal(node(tmp_path / "other").read("web", 3), said(3))


def test_a_store_that_stays_down_is_told_before_the_next_step(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a step a rank must not leave the others; what was to be written is kept."""
    monkeypatch.setattr("ddk_ds.data.teacher_cache.PART_BYTES", 1)
    cache = node(tmp_path / "node", patience_s=0.1)
    s3.down = True
    began = time.monotonic()
    cache.add("web", 3, said(3))
    waited = time.monotonic() - began
    cache.add("web", 4, said(4))
    assert waited >= 0.1 and equal(cache.read("web", 3), said(3))
    nothing: Any = None
    later = CachedTeacher(cache, nothing, nothing, nothing).ahead(iter([nothing]))
    for told in (cache.check, lambda: next(later)):
        with pytest.raises(TemporaryError, match=f"{ADDRESS}/parts/.* cannot be uploaded, tried for .*503"):
            told()
    s3.down = False
    assert cache.offer() is None
    cache.check()
    other = node(tmp_path / "other")
    assert all(equal(other.read("web", number), said(number)) for number in (3, 4))


def test_a_signal_ends_the_patience(s3: S3Server, tmp_path: Path) -> None:
    cache = node(tmp_path / "node")
    cache.add("web", 3, said(3))
    cache.place.give_up_when(lambda: True)
    s3.down = True
    with pytest.raises(TemporaryError, match="503"):
        cache.publish()


def test_damage_is_told_from_a_store_that_refuses(s3: S3Server, tmp_path: Path) -> None:
    cache = node(tmp_path / "node")
    cache.add("web", 3, said(3))
    cache.publish()
    (shard,) = (key for key in keys() if key.endswith(".mds"))
    part = shard.split("/")[-2]
    reader = node(tmp_path / "a")
    s3.deny = True
    with pytest.raises(DataError, match="access is denied") as denied:
        reader.read("web", 3)
    assert "damaged" not in str(denied.value)
    s3.deny = False
    content = client().get_object(Bucket=BUCKET, Key=shard)["Body"].read()
    client().put_object(Bucket=BUCKET, Key=shard, Body=content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        DataError, match=f"part {part} is damaged or incomplete .*its xxh64 is .*delete {ADDRESS}/parts"
    ):
        reader.read("web", 3)
    client().delete_object(Bucket=BUCKET, Key=shard)
    with pytest.raises(DataError, match=f"part {part} is damaged or incomplete .*does not exist"):
        reader.read("web", 3)


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    client().put_object(Bucket=BUCKET, Key="caches/teacher/notes.txt", Body=b"mine")
    with pytest.raises(ConfigError, match=r"it has no teacher\.json"):
        node(tmp_path / "node")
    assert keys() == ["caches/teacher/notes.txt"]


def test_a_credential_that_may_not_write_ends_at_once(s3: S3Server, tmp_path: Path) -> None:
    cache = node(tmp_path / "node")
    cache.add("web", 3, said(3))
    s3.deny_writes = True
    for write in (cache.publish, lambda: node(tmp_path / "other")):
        with pytest.raises(DataError, match=r"access is denied .*may list and write it"):
            write()


def test_a_nodes_shards_are_fetched_before_they_are_read(prepared: Path, tmp_path: Path) -> None:
    """Of the samples that the interval still draws, and no others."""
    dataset = MixtureDataset(prepared, ["large", "small"])
    writer = node(tmp_path / "a", shas={"large": "1", "small": "2"})
    for part in ([("large", 0), ("small", 1)], [("large", 1)], [("large", 2), ("small", 0)]):
        for domain, number in part:
            writer.add(domain, number, said(number))
        writer.publish()
    reader = node(tmp_path / "b", shas={"large": "1", "small": "2"})
    ids = np.array([2, 1, 0, dataset.sample_offsets[1], 5])  # large 2, 1, 0, small 0; 5 is in no part
    uses = reader.first_uses(dataset.by_domain(ids))
    assert [position for position, _ in uses] == [0, 1, 2] and len({shard.name for _, shard in uses}) == 3
    ahead = ReadAhead(LocalStore(prepared), dataset, [], reader, enabled=True)
    ahead.interval(ids, 2)  # the first two are done
    end = time.monotonic() + 60
    while len(found := list((tmp_path / "b").rglob("*.mds"))) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    ahead.advance(5)
    ahead.close()
    assert sorted(path.parent.name for path in found) == sorted(
        shard.name.split("/")[1] for _, shard in uses if shard is not uses[1][1]
    )


def test_data_and_teacher_share_the_limit_of_a_nodes_cache(tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    stores = [CachedStore(str(remote), CacheOptions(tmp_path / "c", 4e-6, 20.0, 1.0), below) for below in ("", ".said")]
    for number in range(8):
        file = remote / f"web/train/{number}.mds"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes([number]) * 1000)
        shard = Shard(f"web/train/{number}.mds", *size_and_xxh64(file))
        for store in stores:
            assert store.shard(shard).read_bytes() == file.read_bytes()
        assert sum(path.stat().st_size for path in (tmp_path / "c/data").rglob("*.mds")) <= 4000


def test_a_place_needs_no_store_before_it_is_used() -> None:
    with pytest.raises(ConfigError, match="cannot be made"):
        RemotePlace(ADDRESS, Data(path="/", cache_dir="/proc/none"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (ADDRESS, "is remote: set data.cache_dir"),
        ("az://bucket/teacher", "give a directory, or an address of s3://, gs://, oci://"),
        ("hf://datasets/me/teacher", "where files can be put and listed"),
    ],
)
def test_an_address_that_cannot_be_is_refused(tmp_path: Path, path: str, message: str) -> None:
    teacher = {"cache": {"path": path}}
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_of(tmp_path, teacher=teacher)
    local = {"cache_dir": str(tmp_path), "download_patience_s": 60.0}
    assert path != ADDRESS or config_of(tmp_path, teacher=teacher, data=local).teacher is not None
