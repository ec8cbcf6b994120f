"""MDS splits and domains.json are read as they were written, and every damage is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ddk_ds.data.manifest import load_manifest, write_manifest
from ddk_ds.data.mds import open_split, token_dtype, write_split
from ddk_ds.data.store import LocalStore
from ddk_ds.errors import DataError


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_tokens_round_trip_over_many_shards(tmp_path: Path, dtype: str) -> None:
    samples = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (100, 16), endpoint=True).astype(dtype)
    written = write_split(tmp_path / "s", samples, sequence_length=16, dtype=dtype, shard_bytes=1024)
    split = open_split(LocalStore(tmp_path), "s")
    assert len(split.shard_sizes) > 2
    assert (len(split), int(split.shard_sizes.sum()), split.sha) == (100, 100, written["sha"])
    read = np.stack([split.tokens(i) for i in range(100)])
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, samples)
    for outside in (-1, 100):
        with pytest.raises(IndexError):
            split.tokens(outside)


def test_sha_changes_with_one_token(tmp_path: Path) -> None:
    samples = np.zeros((10, 8), np.uint16)
    shas = []
    for name in ("a", "b", "c"):
        samples[9, 7] = name == "c"
        shas.append(write_split(tmp_path / name, samples, sequence_length=8, dtype="uint16")["sha"])
    assert shas[0] == shas[1] != shas[2]


def test_dtype_holds_every_id() -> None:
    assert [token_dtype(size) for size in (400, 65_536, 65_537, 151_936)] == [
        "uint16",
        "uint16",
        "uint32",
        "uint32",
    ]


def test_manifest_round_trip(prepared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    (copy / "domains.json").unlink()
    manifest = load_manifest(prepared)
    object.__setattr__(manifest, "root", copy)
    write_manifest(manifest)
    assert load_manifest(copy) == manifest
    assert (copy / "domains.json").read_bytes() == (prepared / "domains.json").read_bytes()
    assert [path for path in copy.iterdir() if path.name.startswith(".")] == []


def edit(change: Callable[[dict], None]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    def damage(root: Path) -> None:
        content = json.loads((root / "domains.json").read_text(encoding="utf-8"))
        change(content)
        (root / "domains.json").write_text(json.dumps(content), encoding="utf-8")

    return damage


def truncate(root: Path) -> None:
    shard = root / "tree/train/shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])


def swap(root: Path) -> None:
    (root / "tree/train").rename(root / "x")
    (root / "large/train").rename(root / "tree/train")
    (root / "x").rename(root / "large/train")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (lambda root: (root / "domains.json").unlink(), r"no domains\.json: it is half-written"),
        (lambda root: (root / "domains.json").write_text("{"), r"domains\.json is damaged"),
        (lambda root: (root / "domains.json").write_text("[]"), r"domains\.json is damaged"),
        (edit(lambda content: content.pop("tokenizer")), r"domains\.json is damaged .*tokenizer"),
        (edit(lambda content: content.update(format=2)), "format 2, not 1"),
        (
            edit(lambda content: content["domains"]["tree"]["train"].pop("sha")),
            r"domains\.json is damaged .*sha",
        ),
        (
            edit(lambda content: content["domains"]["tree"]["train"].update(samples=0)),
            "domain 'tree' .* is empty",
        ),
        (
            edit(lambda content: content["domains"]["tree"]["train"].update(samples=1)),
            r"tree/train is not what",
        ),
        (
            edit(lambda content: content["domains"]["tree"]["train"].update(sha="0")),
            r"tree/train is not what",
        ),
        (truncate, r"tree/train/shard\.00000\.mds has [\d,]+ bytes, its index says"),
        (lambda root: (root / "tree/train/shard.00000.mds").unlink(), r"shard\.00000\.mds is missing"),
        (
            lambda root: (root / "tree/validation/index.json").unlink(),
            r"tree/validation/index\.json is missing",
        ),
        (
            lambda root: (root / "tree/train/index.json").write_text("{}"),
            r"tree/train/index\.json is damaged",
        ),
        (lambda root: shutil.rmtree(root / "tree"), r"tree/train/index\.json is missing"),
        (swap, r"tree/train is not what"),
    ],
)
def test_damage_is_named(prepared: Path, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    root = tmp_path / "data"
    shutil.copytree(prepared, root)
    load_manifest(root)
    damage(root)
    with pytest.raises(DataError, match=message):
        load_manifest(root)


def test_a_missing_domain_is_named(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    manifest.require(["large", "small"])
    with pytest.raises(DataError, match="no domain 'medium'; it has small, tree, large"):
        manifest.require(["large", "medium"])
