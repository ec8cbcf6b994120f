"""Checkpoints on the disk: only complete ones count, and none is lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddk_ds.comm import SingleProcess
from ddk_ds.config import Checkpoint
from ddk_ds.engine.zero_shards import ShardWriter
from ddk_ds.errors import CheckpointError
from ddk_ds.files import size_and_xxh64
from ddk_ds.mixture.interval_state import IntervalState
from ddk_ds.train.checkpoint.checkpoint_files import (
    FORMAT,
    complete_checkpoints,
    delete_old,
    newest_checkpoint,
    other_format,
)
from ddk_ds.train.checkpoint.restore import source_checkpoint
from ddk_ds.train.checkpoint.saver import SaveFailed, Saver
from ddk_ds.train.checkpoint.usable_checkpoint import leave_out_after, usable_checkpoint
from ddk_ds.train.ledger import Ledger
from ddk_ds.train.state import RunState


class FileStudent:
    """Stands in for the engine: the checkpoint's shards are one small file."""

    engine = SimpleNamespace(device="cpu")

    def __init__(self, failure: str = "") -> None:
        self.failure = failure
        self.save_pending = True

    def save(self, directory: Path, tag: str, client_state: dict[str, Any], *, background: bool) -> None:
        self.path = directory / tag / "shard.pt"
        self.path.parent.mkdir()
        self.path.write_bytes(b"weights")

    def wait_for_save(self) -> Any:
        self.save_pending = False
        return {self.path: size_and_xxh64(self.path)}, self.failure


def saver_of(run_dir: Path, **keep: int) -> Saver:
    """Return a saver for the run in `run_dir`."""
    return Saver(run_dir, {"seed": 0}, SingleProcess(), Checkpoint(**keep))


def state_at(step: int) -> RunState:
    """Return the state of a run after `step` steps."""
    entries: Any = [{"name": "a", "num_samples": 4, "sha": "0"}]
    return RunState(data=IntervalState.new(entries, seed=0), step=step)


def save(run_dir: Path, step: int, failure: str = "", **keep: int) -> Path:
    """Save a checkpoint of `step` and return its directory."""
    student: Any = FileStudent(failure)
    saver = saver_of(run_dir, **keep)
    assert saver.begin(student, state_at(step), ledger=(0, ""))
    saved = saver.finish()
    assert saved is not None and saved.step == step and 0 < saved.pause_s <= saved.seconds
    return saved.path


def newest_step(run_dir: Path) -> int | None:
    """Return the step of the newest complete checkpoint, or None."""
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
        manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
    assert newest_step(tmp_path) is None
    assert save(tmp_path, 2) == directory
    assert newest_step(tmp_path) == 2
    (kept,) = directory.parent.glob("broken-step-*")
    assert (kept / "state").is_dir()


def test_a_fork_of_another_format_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, 2)
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', '"format": 3'))
    for source in (directory, tmp_path):
        with pytest.raises(CheckpointError, match=rf"step-00000002 has format 3, .* reads format {FORMAT}: fork it"):
            source_checkpoint(str(source))


def test_a_complete_one_is_left_alone(tmp_path: Path) -> None:
    directory = save(tmp_path, 2)
    before = (directory / "manifest.json").stat().st_mtime_ns
    student: Any = FileStudent()
    saver = saver_of(tmp_path)
    assert not saver.begin(student, state_at(2), ledger=(0, ""))
    assert saver.finish() is None
    assert (directory / "manifest.json").stat().st_mtime_ns == before
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def steps(run_dir: Path) -> list[int]:
    """Return the steps of the checkpoints in `run_dir`, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


def test_the_last_and_every_tenth_are_kept(tmp_path: Path) -> None:
    for step in range(2, 26, 2):
        save(tmp_path, step, keep_last=2, keep_every_steps=10)
    assert steps(tmp_path) == [10, 20, 22, 24]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step-{n:08d}" for n in steps(tmp_path)
    ]


def test_a_write_that_fails_leaves_the_older_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=3)
    with pytest.raises(SaveFailed, match="no space"):
        save(tmp_path, 4, failure="no space", keep_last=3)
    assert steps(tmp_path) == [1, 2, 3]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    save(tmp_path, 4, keep_last=3)
    assert steps(tmp_path) == [2, 3, 4]


def test_no_room_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 6}))
    with pytest.raises(SaveFailed, match=r"has 6 bytes free, a checkpoint takes 7"):
        save(tmp_path, 2)
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("size", ["same", "other"])
def test_a_damaged_one_is_passed_over_and_kept(tmp_path: Path, size: str) -> None:
    save(tmp_path, 1)
    shard = save(tmp_path, 2) / "state/shard.pt"
    shard_of = {"same": b"weighty", "other": b"weight"}
    shard.write_bytes(shard_of[size])
    found = usable_checkpoint(tmp_path, SingleProcess())
    assert found is not None
    directory, manifest, passed = found
    assert (directory.name, manifest.step) == ("step-00000001", 1)
    (one,) = passed
    assert (one.path / "state/shard.pt").read_bytes() == shard_of[size]
    assert (one.path == shard.parents[1]) == (size == "other")  # what is not complete cannot be taken for a checkpoint


@pytest.mark.parametrize("size", ["same", "other"])
def test_all_damaged_is_no_new_beginning(tmp_path: Path, size: str) -> None:
    shard = save(tmp_path, 1) / "state/shard.pt"
    shard.write_bytes(b"weighty" if size == "same" else b"weight")
    with pytest.raises(CheckpointError, match=r"every checkpoint of .* is damaged"):
        usable_checkpoint(tmp_path, SingleProcess())
    shard.write_bytes(b"weights")  # back from a copy
    assert usable_checkpoint(tmp_path, SingleProcess()) is not None


def save_with_ledger(run_dir: Path, num_steps: int, every: int) -> list[int]:
    """Write a ledger of so many steps and a checkpoint every so many; return the ledger's length after each step."""
    ledger, ends = Ledger(run_dir, rank=0), [0]
    ledger.rewind(0)
    for step in range(1, num_steps + 1):
        ledger.write({"kind": "step", "step": step, "loss": 1 / step})
        ends.append((run_dir / "ledger.jsonl").stat().st_size)
        if step % every == 0:
            student: Any = FileStudent()
            saver = saver_of(run_dir)
            assert saver.begin(student, state_at(step), ledger.position()) and saver.finish() is not None
    return ends


@pytest.mark.parametrize("cut", ["in a line", "after a line", "nul", "empty", "missing"])
def test_the_newest_that_the_ledger_reaches(tmp_path: Path, cut: str) -> None:
    ends = save_with_ledger(tmp_path, num_steps=12, every=3)
    path = tmp_path / "ledger.jsonl"
    whole = path.read_bytes()
    kept = {"in a line": ends[9] - 5, "after a line": ends[8], "nul": ends[8], "empty": 0, "missing": 0}[cut]
    path.write_bytes(whole[:kept] + (bytes(len(whole) - kept) if cut == "nul" else b""))
    if cut == "missing":
        path.unlink()
    if kept == 0:
        with pytest.raises(CheckpointError, match=r"the ledger does not reach it: .*step-00000012 was saved at"):
            usable_checkpoint(tmp_path, SingleProcess())
        assert steps(tmp_path) == [6, 9, 12], "the ledger can be put back"
        return
    found = usable_checkpoint(tmp_path, SingleProcess())
    assert found is not None
    directory, manifest, passed = found
    assert (directory.name, manifest.step, manifest.ledger_bytes) == ("step-00000006", 6, ends[6])
    reason = "line 9 of ledger.jsonl, which is damaged" if cut == "nul" else f"ledger.jsonl, which has {kept:,}"
    assert len(passed) == 2 and all(one.path.name.startswith("broken-step-") for one in passed)
    assert all(reason in one.reason for one in passed)
    ledger = Ledger(tmp_path, rank=0)
    ledger.rewind(manifest.ledger_bytes)
    assert path.read_bytes() == whole[: ends[6]]
    assert (tmp_path / "ledger.discarded.jsonl").read_bytes().startswith(whole[ends[6] : ends[8]])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda text: text.replace(b'"step": 4,', b'"st\x00p": 4;'),
            "ledger.jsonl, line 4: damaged since the run wrote",
        ),
        (lambda text: text.replace(b'{"kind": "step", "step": 4,', b"[" * 27), "ledger.jsonl, line 4: damaged"),
        (
            lambda text: text.replace(b'"step": 4, "loss": 0.25', b'"step": 4, "loss": 0.35'),
            "a value in it was changed",
        ),
    ],
    ids=["nul", "brackets", "flipped digit"],
)
def test_damage_before_lines_that_can_be_read_is_an_error(tmp_path: Path, harm: Any, message: str) -> None:
    save_with_ledger(tmp_path, num_steps=12, every=3)
    path = tmp_path / "ledger.jsonl"
    whole = path.read_bytes()
    assert len(harm(whole)) == len(whole) and harm(whole) != whole
    path.write_bytes(harm(whole))
    with pytest.raises(CheckpointError, match=message) as raised:
        usable_checkpoint(tmp_path, SingleProcess())
    assert "init_from=" in str(raised.value) and steps(tmp_path) == [6, 9, 12]
    path.write_bytes(whole + b"half a li")  # damage after the checkpoint is cut off
    found = usable_checkpoint(tmp_path, SingleProcess())
    assert found is not None and found[1].step == 12


def test_no_checkpoint_after_the_last_good_step_is_gone_back_to(tmp_path: Path) -> None:
    save_with_ledger(tmp_path, num_steps=12, every=3)
    found = usable_checkpoint(tmp_path, SingleProcess(), at_most=8)
    assert found is not None and found[1].step == 6 and not found[2]
    leave_out_after(tmp_path, 8, SingleProcess())
    assert steps(tmp_path) == [6] and newest_step(tmp_path) == 6


def test_a_checkpoint_counts_when_all_that_it_needs_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        order.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{tmp_path}/"))
        fsync(descriptor)

    def renamed(event: str, arguments: Any) -> None:
        if event == "os.rename" and recording:
            order.append(f"-> {str(arguments[1]).removeprefix(f'{tmp_path}/')}")

    recording = True
    sys.addaudithook(renamed)
    monkeypatch.setattr(os, "fsync", noted)
    save_with_ledger(tmp_path, num_steps=1, every=1)
    recording = False
    partial, final = "checkpoints/.partial-step-00000001", "checkpoints/step-00000001"
    manifest = next(name for name in order if name.startswith(f"{partial}/.manifest.json."))
    assert order == [
        "ledger.jsonl",
        f"{partial}/state",
        partial,
        manifest,
        f"-> {partial}/manifest.json",
        partial,
        f"-> {final}",
        "checkpoints",
        str(tmp_path),
    ]


@pytest.mark.parametrize("gone", ["checkpoints", "checkpoints/.partial-step-00000004/state", ""])
def test_what_is_deleted_while_it_is_written_is_no_checkpoint(tmp_path: Path, gone: str) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    save(run_dir, 2)
    student: Any = FileStudent()
    saver = saver_of(run_dir)
    assert saver.begin(student, state_at(4), (0, ""))
    written = student.wait_for_save()
    student.wait_for_save = lambda: written
    shutil.rmtree(run_dir / gone)
    with pytest.raises(SaveFailed, match=r"No such file|were deleted while it was written"):
        saver.finish()
    assert newest_step(run_dir) == (2 if "partial" in gone else None)
    if gone:
        assert save(run_dir, 4).is_dir()
    else:
        with pytest.raises(SaveFailed, match="No such file"):
            save(run_dir, 4)
        assert not run_dir.exists()


def test_checkpoints_deleted_by_hand_are_not_deleted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=3)
    found = list(complete_checkpoints(tmp_path / "checkpoints"))
    shutil.rmtree(found[-1][0])
    monkeypatch.setattr("ddk_ds.train.checkpoint.checkpoint_files.complete_checkpoints", lambda root: iter(found))
    delete_old(tmp_path / "checkpoints", Checkpoint(keep_last=2))
    assert steps(tmp_path) == [2, 3]


@pytest.mark.parametrize("key", ["files", "step", "format", "run"])
@pytest.mark.parametrize("value", [[], [[1, 2]], "4", 4.5, None, {"a": [3]}])
def test_a_manifest_of_another_form_is_none(tmp_path: Path, key: str, value: Any) -> None:
    directory = save(tmp_path, 2)
    manifest = json.loads((directory / "manifest.json").read_text())
    if key == "run" and isinstance(value, dict):
        return  # an identity may hold anything
    for content in ({**manifest, key: value}, [manifest], value):
        (directory / "manifest.json").write_text(json.dumps(content))
        assert newest_step(tmp_path) is None
        other_format(directory)


def test_it_counts_only_when_it_is_finished(tmp_path: Path) -> None:
    student: Any = FileStudent()
    saver = saver_of(tmp_path)
    assert not saver.ready()
    saver.begin(student, state_at(3), ledger=(0, ""))
    assert not saver.ready() and newest_step(tmp_path) is None
    student.save_pending = False
    assert saver.ready() and newest_step(tmp_path) is None
    saver.finish()
    assert newest_step(tmp_path) == 3


def test_a_file_that_cannot_be_written_is_noted(tmp_path: Path) -> None:
    for background in (False, True):
        writer = ShardWriter()
        writer.begin(background=background)
        writer.save({"a": 1}, str(tmp_path / "a.pt"))
        (tmp_path / "file").touch()
        writer.save({"a": 1}, str(tmp_path / "file/b.pt"))
        files, failure = writer.wait()
        assert "file/b.pt" in failure
        assert files == {tmp_path / "a.pt": size_and_xxh64(tmp_path / "a.pt")}
        assert writer.load(str(tmp_path / "a.pt")) == {"a": 1}


def test_a_directory_that_cannot_be_made_is_noted(tmp_path: Path) -> None:
    writer = ShardWriter()
    writer.begin(background=False)
    writer.makedirs(str(tmp_path / "a/b"))
    (tmp_path / "file").touch()
    writer.makedirs(str(tmp_path / "file/b"))
    writer.keep_error(lambda path: Path(path).write_text(""), str(tmp_path / "file/c"))
    assert writer.wait() == ({}, f"{tmp_path}/file/b: [Errno 20] Not a directory: '{tmp_path}/file/b'")
    assert (tmp_path / "a/b").is_dir()


def test_what_is_written_in_the_background_is_what_was_saved(tmp_path: Path) -> None:
    writer, weights, nested = ShardWriter(), torch.zeros(1 << 20), {"step": torch.tensor(3.0)}
    writer.begin(background=True)
    writer.save({"weights": [weights], "state": {0: nested}}, str(tmp_path / "a.pt"))
    weights.fill_(1.0)
    nested["step"] += 1
    assert writer.wait()[1] == ""
    read = writer.load(str(tmp_path / "a.pt"))
    assert not read["weights"][0].any() and read["state"][0]["step"] == 3


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    with (tmp_path / "a.pt").open("wb") as stream:
        torch.save({"bad": Path("x")}, stream)
    with pytest.raises(pickle.UnpicklingError, match="PosixPath"):
        ShardWriter().load(str(tmp_path / "a.pt"))
