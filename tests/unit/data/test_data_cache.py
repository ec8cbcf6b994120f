"""A node's cache fetches each shard once, keeps its limit and its integrity, and survives a remote that fails."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddk_ds.config import Config, Data, make_config
from ddk_ds.data import cache as cache_module
from ddk_ds.data import remote as fetch_module
from ddk_ds.data.cache import CachedStore, CacheOptions, Prefetcher, open_store
from ddk_ds.data.loader import MixtureDataset
from ddk_ds.data.manifest import FILE_NAME, load_manifest
from ddk_ds.data.mds import write_split
from ddk_ds.data.store import LocalStore, Shard
from ddk_ds.errors import ConfigError, DataError, TemporaryError

NAMES = ["large", "small", "tree"]
GB = 10**9


@pytest.fixture
def remote(prepared: Path, tmp_path: Path) -> Path:
    """Copy the prepared data with shards of two samples, as another machine would hold them."""
    root = tmp_path / "remote"
    shutil.copytree(prepared, root)
    content = json.loads((root / FILE_NAME).read_text())
    source = MixtureDataset(prepared, NAMES, masked=True)
    length = content["sequence_length"]
    for domain, name in enumerate(NAMES):
        shutil.rmtree(root / name / "train")
        first = int(source.sample_offsets[domain])
        read = [source.read(first + i)[0] for i in range(int(source.sizes[domain]))]
        written = write_split(
            root / name / "train",
            [packed.tokens for packed in read],
            sequence_length=length,
            dtype=content["dtype"],
            shard_bytes=4 * length + 200,
            lengths=[packed.lengths for packed in read],
        )
        content["domains"][name]["train"] |= written
    (root / FILE_NAME).write_text(json.dumps(content))
    return root


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("ddk_ds.data.patience._FIRST_WAIT_S", 0.01)
    yield
    for stream in cache_module._claims.values():
        stream.close()
    cache_module._claims.clear()


def cached(remote: Path | str, tmp_path: Path, **changes: float | None) -> CachedStore:
    values = {"limit_gb": None, "timeout_s": 20.0, "patience_s": 5.0} | changes
    return CachedStore(str(remote), CacheOptions(tmp_path / "cache", **values))  # type: ignore[arg-type]


def count_fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    fetched: list[str] = []
    original = fetch_module.Fetcher._download

    def download(self: fetch_module.Fetcher, name: str, path: Path) -> None:
        fetched.append(name)
        original(self, name, path)

    monkeypatch.setattr(fetch_module.Fetcher, "_download", download)
    return fetched


def shards_on_disk(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/data").rglob("*.mds"))


def test_every_sample_is_the_remotes_and_every_shard_is_fetched_once(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = count_fetches(monkeypatch)
    here, there = MixtureDataset(cached(remote, tmp_path), NAMES), MixtureDataset(remote, NAMES)
    order = np.random.default_rng(0).permutation(len(there))
    for _ in range(2):
        for i in order.tolist():
            assert (here[i]["input_ids"] == there[i]["input_ids"]).all()
    shards = [name for name in fetched if name.endswith(".mds")]
    assert len(shards) == len(set(shards)) == sum(len(sizes) for sizes in there.shard_sizes)


def test_the_limit_holds_and_everything_is_still_read(remote: Path, tmp_path: Path) -> None:
    largest = max(file.stat().st_size for file in remote.rglob("train/*.mds"))
    validation = max(file.stat().st_size for file in remote.rglob("validation/*.mds"))
    limit = 4 * max(largest, validation)
    here = MixtureDataset(cached(remote, tmp_path, limit_gb=limit / GB), NAMES)
    there = MixtureDataset(remote, NAMES)
    most = 0
    for i in np.random.default_rng(0).permutation(len(there)).tolist():
        assert (here[i]["input_ids"] == there[i]["input_ids"]).all()
        most = max(most, sum(file.stat().st_size for file in shards_on_disk(tmp_path)))
    assert limit // 2 < most <= limit
    assert all(file.is_file() for file in remote.rglob("*.mds"))
    assert sum(1 for _ in remote.rglob("train/*.mds")) > 40


def test_a_limit_under_four_shards_is_refused(remote: Path, tmp_path: Path) -> None:
    largest = max(file.stat().st_size for file in remote.rglob("*.mds"))
    with pytest.raises(ConfigError, match=r"data\.cache_limit_gb is .*: it must hold 4 shards"):
        load_manifest(cached(remote, tmp_path, limit_gb=3.9 * largest / GB))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "s3://bucket/data"}, "set cache_dir"),
        ({"path": "data", "cache_limit_gb": 1.0}, "without cache_dir"),
        ({"path": "data", "cache_dir": "c", "cache_limit_gb": 0.0}, "greater than 0"),
    ],
)
def test_invalid_configurations_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Data(**values)  # type: ignore[arg-type]


def test_a_damaged_remote_shard_names_file_domain_expected_and_found(remote: Path, tmp_path: Path) -> None:
    here = MixtureDataset(cached(remote, tmp_path), NAMES)
    file = remote / "small/train/shard.00000.mds"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    expected = (
        r"small/train/shard\.00000\.mds of domain 'small' cannot be fetched, 5 attempts: .*xxh64 is [0-9a-f]{16}, "
    )
    with pytest.raises(DataError, match=expected + r"its index says [0-9a-f]{16}"):
        here[int(here.sample_offsets[1])]
    assert not list((tmp_path / "cache/fetching").iterdir())


def test_a_shard_that_rots_in_the_cache_is_fetched_again(remote: Path, tmp_path: Path) -> None:
    here = MixtureDataset(cached(remote, tmp_path), NAMES)
    expected = here[0]["input_ids"]
    (file,) = shards_on_disk(tmp_path)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert (here[0]["input_ids"] == expected).all()


def test_an_index_of_an_earlier_preparation_is_fetched_again(remote: Path, tmp_path: Path) -> None:
    load_manifest(cached(remote, tmp_path))
    index = tmp_path / "cache/data/small/train/index.json"
    shutil.copyfile(remote / "tree/train/index.json", index)
    assert load_manifest(cached(remote, tmp_path)).domains["small"].train.samples > 0


def test_a_missing_remote_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no domains\.json|domains\.json does not exist; check the address"):
        load_manifest(cached(tmp_path / "nothing", tmp_path))


def test_a_slow_remote_ends_in_an_error(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streaming.base.storage.download import LocalDownloader

    here = MixtureDataset(cached(remote, tmp_path, timeout_s=0.3, patience_s=0.6), NAMES)
    monkeypatch.setattr(LocalDownloader, "_download_file_impl", lambda *_: time.sleep(60))
    started = time.monotonic()
    with pytest.raises(
        TemporaryError, match=r"\.mds of domain 'large' .* tried for \d+ s: .*download_timeout_s, 0\.3 s"
    ):
        here[0]
    assert time.monotonic() - started < 30


def test_failed_attempts_are_repeated(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streaming.base.storage.download import LocalDownloader

    original, calls = LocalDownloader._download_file_impl, []

    def flaky(self: LocalDownloader, *arguments: object) -> None:
        calls.append(arguments)
        if len(calls) % 3:
            raise ConnectionError("https://user:password@store/x?signature=abc reset")
        original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalDownloader, "_download_file_impl", flaky)
    monkeypatch.setattr("ddk_ds.data.patience._FIRST_WAIT_S", 0.01)
    there = MixtureDataset(remote, NAMES)
    here = MixtureDataset(cached(remote, tmp_path), NAMES)
    assert all((here[i]["input_ids"] == there[i]["input_ids"]).all() for i in range(0, len(there), 7))
    with pytest.raises(
        TemporaryError, match=r"ConnectionError: https://\*\*\*@store/x\?signature=\*\*\* reset"
    ) as error:
        MixtureDataset(cached(remote, tmp_path, patience_s=0.0), NAMES)[len(there) - 1]
    assert "password" not in str(error.value)


def test_ids_beyond_the_vocabulary_are_refused(remote: Path) -> None:
    content = json.loads((remote / FILE_NAME).read_text())
    content["tokenizer"]["vocab_size"] = 3
    (remote / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"of domain 'large': sample 0 holds id \d+, the vocabulary has 3"):
        MixtureDataset(remote, NAMES)[0]


def test_local_shards_are_verified_at_their_first_use_and_when_they_change(remote: Path) -> None:
    data = MixtureDataset(remote, NAMES)
    data[0]
    file = remote / "large/train/shard.00000.mds"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for dataset in (data, MixtureDataset(remote, NAMES)):
        with pytest.raises(DataError, match=r"train/shard\.00000\.mds of domain 'large' is damaged: its xxh64 is"):
            dataset[0]


def test_an_extra_shard_is_refused(remote: Path) -> None:
    shutil.copyfile(remote / "large/train/shard.00000.mds", remote / "large/train/shard.99999.mds")
    with pytest.raises(DataError, match=r"shard\.99999\.mds, which its index\.json does not list"):
        load_manifest(remote)


def _read_all(dataset: MixtureDataset, results: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    try:
        results.put(sum(int(dataset[i]["input_ids"].sum()) for i in range(len(dataset))))
    except Exception as error:
        results.put(repr(error))


@pytest.mark.parametrize(
    "start", ["fork", pytest.param("spawn", marks=pytest.mark.long("three new interpreters; fork has the same code"))]
)
def test_processes_share_a_cache_that_is_too_small(remote: Path, tmp_path: Path, start: str) -> None:
    largest = max(file.stat().st_size for file in remote.rglob("*.mds"))
    here, there = (
        MixtureDataset(cached(remote, tmp_path, limit_gb=4 * largest / GB), NAMES),
        MixtureDataset(remote, NAMES),
    )
    context = multiprocessing.get_context(start)
    results = context.Queue()
    processes = [context.Process(target=_read_all, args=(here, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == [sum(int(there[i]["input_ids"].sum()) for i in range(len(there)))] * 3


def test_a_store_is_pickled_without_its_clients(remote: Path, tmp_path: Path) -> None:
    store = cached(remote, tmp_path)
    store.read(FILE_NAME)
    assert pickle.loads(pickle.dumps(store)).fetcher._downloaders == {}


def test_files_of_a_killed_job_are_removed_and_those_of_a_running_job_are_not(remote: Path, tmp_path: Path) -> None:
    data = Data(path=str(remote), cache_dir=str(tmp_path / "cache"))
    open_store(data).read(FILE_NAME)
    left = tmp_path / "cache/fetching/left"
    left.write_bytes(b"x")
    script = (
        "import sys; from ddk_ds.config import Data; from ddk_ds.data.cache import open_store\n"
        "limit = float(sys.argv[3]) if len(sys.argv) > 3 else None\n"
        "open_store(Data(path=sys.argv[1], cache_dir=sys.argv[2], cache_limit_gb=limit))"
    )

    def another(path: Path, *limit: str) -> str:
        command = [sys.executable, "-c", script, str(path), str(tmp_path / "cache"), *limit]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ).stderr

    assert another(remote) == ""  # shares it
    assert left.exists()  # it can belong to this process
    assert "is in use by a job with data.cache_limit_gb None, here it is 1.0" in another(remote, "1.0")
    cache_module._claims.popitem()[1].close()
    assert another(remote, "1.0") == ""
    assert not left.exists()
    assert "give each its own directory" in another(remote.parent)


def test_the_prefetcher_fetches_in_order_and_keeps_its_limit(remote: Path, tmp_path: Path) -> None:
    there = MixtureDataset(remote, NAMES)
    largest = max(file.stat().st_size for file in remote.rglob("*.mds"))
    store = cached(remote, tmp_path, limit_gb=8 * largest / GB)
    uses = there.first_uses(np.random.default_rng(1).permutation(len(there)))
    assert [position for position, _ in uses] == sorted(position for position, _ in uses)
    fetched: list[str] = []
    original = store._fetch

    def fetch(shard: Shard, path: Path) -> None:
        fetched.append(shard.name)
        original(shard, path)

    store._fetch = fetch  # type: ignore[method-assign]
    prefetcher = Prefetcher(store)
    prefetcher.follow(uses)
    deadline = time.monotonic() + 10
    while not fetched and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    allowed = [shard.name for _, shard in uses]
    assert fetched == allowed[: len(fetched)] and 1 <= len(fetched) < len(allowed) // 2
    prefetcher.advance(len(there))
    prefetcher.close()


def test_the_local_store_names_a_missing_file(remote: Path) -> None:
    data = MixtureDataset(remote, NAMES)
    (remote / "large/train/shard.00000.mds").unlink()
    with pytest.raises(DataError, match=r"shard\.00000\.mds of domain 'large' is gone"):
        data[0]
    shard = Shard("large/train/shard.00001.mds", 1, None)
    with pytest.raises(DataError, match=r"its index says 1 \(domain 'large'\);"):
        LocalStore(remote).shard(replace(shard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MB (needs root)."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user may not mount a file system: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_named_and_fetched_shards_are_kept(remote: Path, small_disk: Path) -> None:
    there = MixtureDataset(remote, NAMES)
    store = CachedStore(str(remote), CacheOptions(small_disk, None, 20.0, 2))
    here = MixtureDataset(store, NAMES)
    room = small_disk / "room"
    room.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 4096))
    with pytest.raises(DataError, match=r"data\.cache_dir .*: the disk is full while .*\.mds of .* is fetched"):
        for i in range(len(here)):
            here[i]
    kept = list(small_disk.rglob("*.mds"))
    room.unlink()
    assert all((here[i]["input_ids"] == there[i]["input_ids"]).all() for i in range(10))
    assert all(file.is_file() for file in kept)


@pytest.mark.parametrize("limit", ["start_s", "step_s", "evaluation_s"])
def test_no_limit_ends_a_rank_that_may_still_wait_for_its_store(limit: str) -> None:
    def config(**limits: float) -> Config:
        data = {"path": "s3://bucket/data", "cache_dir": "cache", "download_timeout_s": 60.0}
        values = {"name": "n", "student": {"path": "s"}, "method": "cpt", "stop": {"steps": 9999}, "data": data}
        return make_config({**values, "limits": limits}, "test")

    assert config(**{limit: 961.0}).data.download_patience_s == 900
    assert config(**{limit: 0.0}), "no limit"
    with pytest.raises(ConfigError, match=rf"limits\.{limit} is 960, and data\.download_patience_s .* is 960"):
        config(**{limit: 960.0})
