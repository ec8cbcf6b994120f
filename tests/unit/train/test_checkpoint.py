"""Checkpoints on disk: what counts as complete, and what is never lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddk_ds.comm import SingleProcess
from ddk_ds.mixture.schedule import IntervalState
from ddk_ds.train.checkpoint import newest_checkpoint, save_checkpoint
from ddk_ds.train.state import RunState


class FileStudent:
    """Stands in for the engine: the checkpoint's shards are one small file."""

    def save(self, directory: Path, tag: str, client_state: dict[str, Any]) -> None:
        (directory / tag).mkdir()
        (directory / tag / "shard.pt").write_bytes(b"weights")


def save(run_dir: Path, step: int) -> Path:
    """A checkpoint of `step`."""
    entries: Any = [{"name": "a", "num_samples": 4, "sha": "0"}]
    state = RunState(data=IntervalState.new(entries, seed=0), step=step)
    student: Any = FileStudent()
    return save_checkpoint(student, state, run_dir, ledger_bytes=0, comm=SingleProcess())


def newest_step(run_dir: Path) -> int | None:
    """Step of the newest complete checkpoint."""
    found = newest_checkpoint(run_dir)
    return None if found is None else found[1].step


def test_the_newest_complete_one_counts(tmp_path: Path) -> None:
    save(tmp_path, 2)
    directory = save(tmp_path, 10)
    assert newest_step(tmp_path) == 10
    (directory / "manifest.json").unlink()
    assert newest_step(tmp_path) == 2


@pytest.mark.parametrize("harm", ["no manifest", "cut manifest", "cut shard", "no shard", "other format"])
def test_an_incomplete_one_is_written_again_and_kept(tmp_path: Path, harm: str) -> None:
    directory = save(tmp_path, 2)
    manifest, shard = directory / "manifest.json", directory / "state" / "shard.pt"
    if harm == "no manifest":
        manifest.unlink()
    elif harm == "cut manifest":
        manifest.write_text(manifest.read_text()[:20])
    elif harm == "cut shard":
        shard.write_bytes(b"wei")
    elif harm == "no shard":
        shard.unlink()
    else:
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    assert newest_step(tmp_path) is None
    assert save(tmp_path, 2) == directory
    assert newest_step(tmp_path) == 2
    (kept,) = directory.parent.glob("broken-step-*")
    assert (kept / "state").is_dir()


def test_a_complete_one_is_left_alone(tmp_path: Path) -> None:
    directory = save(tmp_path, 2)
    before = (directory / "manifest.json").stat().st_mtime_ns
    save(tmp_path, 2)
    assert (directory / "manifest.json").stat().st_mtime_ns == before
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]
