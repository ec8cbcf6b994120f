"""Which directories are checkpoints, which is the newest, and which are deleted, on directories made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.config import Checkpoint
from ddk_ds.files import PARTIAL
from ddk_ds.train.checkpoint import checkpoint_files as module
from ddk_ds.train.checkpoint.checkpoint_files import (
    FORMAT,
    Manifest,
    complete_checkpoints,
    delete_old,
    newest_checkpoint,
    other_format,
    put_in_place,
    read_manifest,
    remove_partial,
)


def make(run_dir: Path, step: int) -> Path:
    """Write a checkpoint of two files as a run does, and return its directory."""
    partial, final = run_dir / "checkpoints" / f"{PARTIAL}step-{step}", run_dir / f"checkpoints/step-{step:08d}"
    (partial / "state").mkdir(parents=True)
    (partial / "state/shard.pt").write_bytes(b"weights")
    (partial / "join.py").write_bytes(b"script")
    assert put_in_place(partial, final, Manifest(FORMAT, step, 2, 100, {"seed": 0}, {}, {})) == ""
    return final


def change(directory: Path, **values: Any) -> None:
    """Change values of a manifest; None removes the key."""
    path = directory / "manifest.json"
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_checkpoint_is_all_of_its_files(tmp_path: Path) -> None:
    directory = make(tmp_path, 7)
    manifest = read_manifest(directory)
    assert manifest is not None and manifest.num_bytes == len("weights" + "script") and manifest.step == 7
    assert {path: size for path, (size, _) in manifest.files.items()} == {"state/shard.pt": 7, "join.py": 6}
    (directory / "join.py").write_bytes(b"scrip")
    assert read_manifest(directory) is None and newest_checkpoint(tmp_path) is None


def test_the_highest_step_is_the_newest(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "ledger.jsonl").touch()
    for step in (9, 100, 20):
        make(tmp_path, step)
    assert [manifest.step for _, manifest in complete_checkpoints(tmp_path / "checkpoints")] == [100, 20, 9]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest[1].step == 100 and newest[0].name == "step-00000100"


def test_a_manifest_that_was_changed_is_none(tmp_path: Path) -> None:
    directory = make(tmp_path, 7)
    (key,) = {"xxh64"} & set(json.loads((directory / "manifest.json").read_text()))
    change(directory, ledger_bytes=101)
    assert read_manifest(directory) is None
    change(directory, ledger_bytes=100)
    assert read_manifest(directory) is not None
    change(directory, **{key: None}, ledger_bytes=101)  # one that was written without its hash
    assert read_manifest(directory) is not None


@pytest.mark.parametrize(("found", "other"), [(FORMAT - 1, FORMAT - 1), (FORMAT, None), ("four", None), (None, None)])
def test_the_format_of_another_version_is_told(tmp_path: Path, found: Any, other: int | None) -> None:
    directory = make(tmp_path, 7)
    change(directory, format=found)
    assert other_format(directory) == other
    (directory / "manifest.json").unlink()
    assert other_format(directory) is None


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ({"keep_last": 1}, [30]),
        ({"keep_last": 2}, [25, 30]),
        ({"keep_last": 9}, [5, 10, 15, 20, 25, 30]),
        ({"keep_last": 1, "keep_every_steps": 10}, [10, 20, 30]),
    ],
)
def test_old_checkpoints_are_deleted_and_incomplete_ones_are_not(
    tmp_path: Path, keep: dict[str, int], kept: list[int]
) -> None:
    for step in range(5, 35, 5):
        make(tmp_path, step)
    (tmp_path / "checkpoints/step-00000003").mkdir()
    delete_old(tmp_path / "checkpoints", Checkpoint(**keep))
    assert names(tmp_path) == ["step-00000003", *(f"step-{step:08d}" for step in kept)]


def test_an_incomplete_one_gives_way_and_is_kept(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step-00000007").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000007/half").touch()
    make(tmp_path, 7)
    (aside,) = (tmp_path / "checkpoints").glob("broken-step-00000007-*")
    assert (aside / "half").exists() and newest_checkpoint(tmp_path) is not None


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    directory = make(tmp_path, 7)
    for name in ("step-8", "old-step-2"):
        (tmp_path / "checkpoints" / f"{PARTIAL}{name}/state").mkdir(parents=True)
    remove_partial(tmp_path)
    assert names(tmp_path) == [directory.name] and read_manifest(directory) is not None


def test_what_cannot_be_removed_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link in the place of a directory, and a checkpoint that somebody deletes first."""
    directory = make(tmp_path, 7)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints" / f"{PARTIAL}link").symlink_to(tmp_path / "elsewhere")
    remove_partial(tmp_path)
    assert (tmp_path / "elsewhere").is_dir()
    manifest = read_manifest(directory)
    found = [(directory, manifest), (directory.with_name("step-00000005"), manifest)]
    monkeypatch.setattr(module, "complete_checkpoints", lambda root: iter(found))
    delete_old(tmp_path / "checkpoints", Checkpoint(keep_last=1))
    assert read_manifest(directory) == manifest


def test_a_checkpoint_that_cannot_be_put_in_place_says_why(tmp_path: Path) -> None:
    final = tmp_path / "checkpoints/step-00000007"
    assert put_in_place(tmp_path / "checkpoints/gone", final, Manifest(FORMAT, 7, 1, 0, {}, {}, {})) != ""
    assert not final.exists()
