"""A run's directory: which options make another run, what may lie in it, and its lock."""

from __future__ import annotations

import fcntl
import os
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddk_ds.config import Config
from ddk_ds.errors import CheckpointError
from ddk_ds.train import run_dir as module
from ddk_ds.train.run_dir import check_run_dir, claim_run_dir, run_identity
from tests.unit.train.short_config import config_of

# Where things lie, how fast the run is, and when it saves, watches and tells: none changes a number.
FREE: list[dict[str, Any]] = [
    {"name": "other"},
    {"output_dir": "/elsewhere"},
    {"checkpoint": {"every_steps": 7}},
    {"guard": {"spike_steps": 9}},
    {"monitor": {"samples_every": 9}},
    {"data": {"path": "elsewhere"}},
    {"data": {"num_workers": 3}},
    {"data": {"cache_dir": "/cache"}},
    {"student": {"path": "elsewhere"}},
    {"teacher": {"path": "elsewhere"}},
    {"teacher": {"shard_within": "node"}},
    {"teacher": {"shard_within": "gpu"}},
    {"teacher": {"shard_within": "auto"}},
    {"train": {"micro_batch_samples": 2}},
]
# Every one of these changes a number.
BOUND: list[dict[str, Any]] = [
    {"seed": 5},
    {"data": {"sequence_length": 64}},
    {"data": {"validation_samples": 3}},
    {"teacher": {"quantize": "int8"}},
    {"teacher": {"compile_layers": True}},
    {"teacher": {"quantize": "fp8"}},
    {"teacher": {"quantize": "int8", "quantize_skip_layers": [0, -1]}},
    {"train": {"global_batch_samples": 512}},
    {"train": {"precision": "fp32"}},
    {"mixture": {"alpha": 0.25}},
    {"loss": {"gamma": 0.3}},
    {"optimizer": {"weight_decay": 0.0}},
    {"stop": {"intervals": 3}},
]


def test_only_what_changes_a_number_makes_another_run(tmp_path: Path) -> None:
    identity = run_identity(config_of(tmp_path), {"data": "hash"})
    assert identity["content.data"] == "hash"
    for sections in FREE:
        assert run_identity(config_of(tmp_path, **sections), {"data": "hash"}) == identity, sections
    for sections in BOUND:
        assert run_identity(config_of(tmp_path, **sections), {"data": "hash"}) != identity, sections


def test_where_a_compiled_teacher_lies_changes_numbers_if_it_is_compiled_as_a_whole(tmp_path: Path) -> None:
    def key(**teacher: Any) -> Any:
        return run_identity(config_of(tmp_path, teacher={"compile_layers": True, **teacher}), {})

    assert key() == key(shard_within="node") != key(shard_within="gpu")
    assert key(shard_within="gpu")["teacher.compile_layers"] == "whole"


def test_a_forks_source_is_asked_for_until_the_run_has_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    config = config_of(tmp_path, init_from=str(tmp_path / "old"))
    newest: list[Any] = [None]
    monkeypatch.setattr(module, "newest_checkpoint", lambda run_dir: newest[0])
    monkeypatch.setattr(module, "check_source", lambda source, init_as, identity: f"hash of {Path(source).name}")
    identity = run_identity(config, {})
    assert identity["content.init_from"] == "hash of old" and "init_from" not in identity
    newest[0] = tmp_path, SimpleNamespace(run={"content.init_from": "hash at the start"})
    assert run_identity(config, {})["content.init_from"] == "hash at the start"
    newest[0] = tmp_path, SimpleNamespace(run={})
    assert run_identity(config, {})["content.init_from"] == "hash of old"
    assert "content.init_from" not in run_identity(config_of(tmp_path), {})


def refusal(config: Config, identity: dict[str, Any]) -> str:
    """Return the message of the refusal; "" if the run may start there."""
    try:
        check_run_dir(config, identity)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path / "runs")
    assert refusal(config, {}) == ""
    (config.run_dir / "slurm").mkdir(parents=True)
    (config.run_dir / ".lock").touch()
    assert refusal(config, {}) == ""
    (config.run_dir / "notes.txt").touch()
    assert "holds files of something else" in refusal(config, {})


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(dir: Path) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", full)
    found = refusal(config_of(tmp_path / "runs"), {})
    assert "cannot be written" in found and "Read-only file system" in found


def test_four_of_the_options_that_differ_are_shown(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    identity = run_identity(config, {})
    claim_run_dir(config, identity)
    assert refusal(config, identity) == ""
    other = {**identity, "z": 1, "seed": 9, "loss.gamma": 9, "mixture.alpha": 9, "optimizer.eps": 9}
    found = refusal(config, other)
    assert found.count(" was ") == 4 and "seed was" in found and "z was" not in found


def test_never_resuming_is_for_runs_that_have_begun(tmp_path: Path) -> None:
    never, always = (config_of(tmp_path, checkpoint={"resume": when}) for when in ("never", "auto"))
    identity = run_identity(never, {})
    claim_run_dir(never, identity)
    assert refusal(never, identity) == ""
    (never.run_dir / "ledger.jsonl").touch()
    assert "checkpoint.resume is never" in refusal(never, identity)
    assert refusal(always, identity) == ""


@pytest.mark.parametrize("name", ["step-00000002", "broken-step-00000002-7"])
def test_checkpoints_of_which_none_is_complete_are_no_new_beginning(tmp_path: Path, name: str) -> None:
    config = config_of(tmp_path)
    identity = run_identity(config, {})
    claim_run_dir(config, identity)
    (config.run_dir / "checkpoints" / name).mkdir(parents=True)
    assert "none is complete" in refusal(config, identity)


def test_one_process_runs_in_a_directory(tmp_path: Path) -> None:
    config = config_of(tmp_path / "deep" / "runs")
    config.run_dir.mkdir(parents=True)
    with (config.run_dir / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=r": another process is running in it; stop that"):
            claim_run_dir(config, {})
        other.write("process 7 on a host with a very long name, which is longer than ours\n")
        other.flush()
        with pytest.raises(CheckpointError, match=r": process 7 on a host .* ours is running in it"):
            claim_run_dir(config, {})
    claim_run_dir(config, {})
    assert (config.run_dir / ".lock").read_text() == f"process {os.getpid()} on {platform.node()}"
    claim_run_dir(config, {})  # the same process again
    with (config.run_dir / ".lock").open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(stream: Any, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    config = config_of(tmp_path / "deep" / "runs")
    claim_run_dir(config, {"seed": 1})
    assert (config.run_dir / "run.json").is_file() and (config.run_dir / "config.yaml").is_file()
