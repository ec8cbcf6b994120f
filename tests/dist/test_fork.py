"""Forks: runs that begin from the checkpoint of another run, by `init_from`, under another configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.comm import SingleProcess
from ddk_ds.config import load_config
from ddk_ds.errors import CheckpointError
from ddk_ds.train.inputs import check_inputs
from ddk_ds.train.run_dir import run_identity
from tests.dist.ranks import run_ranks
from tools.bench.small_run import without_clock, write_config

WORKER = "tests.dist.resume_worker:"


@pytest.fixture(scope="module")
def source(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the configuration of a finished run of 6 steps with checkpoints at steps 3 and 6."""
    config = write_config(workspace, tmp_path_factory.mktemp("fork"), name="source", stop={"steps": 6})
    run_ranks(f"{WORKER}go_on", 2, timeout_s=300, config_path=str(config), name="source")
    return config


def fork(source: Path, workspace: Path, **sections: Any) -> Path:
    """Return the configuration of a fork of the source at step 3."""
    checkpoint = source.parent / "runs/source/checkpoints/step-00000003"
    return write_config(workspace, source.parent, **{"init_from": str(checkpoint), "stop": {"steps": 6}, **sections})


def test_the_same_configuration_goes_the_same_way(source: Path, workspace: Path) -> None:
    config = fork(source, workspace, name="same")
    run_ranks(f"{WORKER}go_on", 2, timeout_s=300, config_path=str(config), name="same")
    runs = source.parent / "runs"
    tail = [line for line in without_clock(runs / "source") if line["step"] > 3]
    assert without_clock(runs / "same") == tail
    assert (runs / "source/checkpoints/step-00000003/manifest.json").is_file()


@pytest.mark.long("three more runs; the fork itself is tested above")
def test_another_configuration_on_another_number_of_ranks(source: Path, workspace: Path) -> None:
    changed = {"mixture": {"alpha": 0.2, "interval_steps": 2}, "optimizer": {"learning_rate": 1e-3}}
    changed |= {"checkpoint": {"in_background": False}}
    config = fork(source, workspace, name="other", **changed, loss={"gamma": 0.5}, stop={"steps": 7})
    run_ranks(f"{WORKER}break_off", 1, timeout_s=300, config_path=str(config), name="other", lines=3)
    # Broken off before its first checkpoint it begins again; after that it needs the source no more.
    run_ranks(f"{WORKER}break_off", 1, timeout_s=300, config_path=str(config), name="other", lines=6)
    moved = source.parent / "runs/source/checkpoints/step-00000003"
    shutil.move(moved, source.parent / "elsewhere")
    try:
        run_ranks(f"{WORKER}go_on", 1, timeout_s=300, config_path=str(config), name="other")
    finally:
        shutil.move(source.parent / "elsewhere", moved)
    lines = without_clock(source.parent / "runs/other")
    assert [line["step"] for line in lines if line["kind"] == "step"] == [4, 5, 6, 7]
    # It finishes the interval that the source was in, then follows its own plan.
    assert [line["step"] for line in lines if line["kind"] == "interval"] == [4, 6]
    events = [json.loads(line) for line in (source.parent / "runs/other/events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events if e["event"] in ("fork", "start", "resume")] == ["fork", "fork", "resume"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"seed": 1}, r"seed was 0, is 1"),
        ({"train": {"global_batch_samples": 4}}, r"train.global_batch_samples was 8, is 4"),
        ({"data": {"domains": ["python", "cpp"]}}, r"content.domains.mathematics was '.*', is None"),
        ({"init_from": "nowhere"}, r"init_from: \S+/nowhere is neither a complete checkpoint"),
    ],
)
def test_what_may_not_change(source: Path, workspace: Path, sections: dict[str, Any], message: str) -> None:
    config = load_config(str(fork(source, workspace, name="bad", **{**sections})), [])
    with pytest.raises(CheckpointError, match=message):
        run_identity(config, check_inputs(config, SingleProcess()).fingerprints)
