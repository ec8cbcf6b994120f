"""Forks: runs that begin from the checkpoint of another run, by `init_from`, under another configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ddk_ds.comm import SingleProcess
from ddk_ds.config import load_config
from ddk_ds.engine.zero_shards import load_shard
from ddk_ds.errors import CheckpointError
from ddk_ds.run_files import read_summary
from ddk_ds.train.inputs import check_inputs
from ddk_ds.train.run_dir import run_identity
from tests.dist.ranks import run_ranks
from tests.dist.test_left_out_tokens import perplexities
from tools.bench.small_run import run_here, without_clock, write_config

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


@pytest.fixture(scope="module")
def short_shards(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the workspace's text as samples of 32 tokens; the source's have 64."""
    shards = tmp_path_factory.mktemp("short")
    options = ["--sequence-length", "32", "--validation-samples", "12", "--workers", "1"]
    recipe, tokenizer = str(workspace / "recipe.yaml"), str(workspace / "tokenizer")
    run_here("prepare", "--recipe", recipe, "--tokenizer", tokenizer, "--out", str(shards), *options)
    return shards


def moments(checkpoint: Path, rank: int) -> tuple[torch.Tensor, float]:
    """Return a rank's second moments, flat, and AdamW's number of updates."""
    shard = load_shard(checkpoint / f"state/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
    states = shard["optimizer_state_dict"]["state"].values()
    return torch.cat([state["exp_avg_sq"] for state in states]), max(float(state["step"]) for state in states)


def test_a_phase_has_the_weights_and_moments_and_all_else_of_its_own(
    source: Path, workspace: Path, short_shards: Path
) -> None:
    """Its perplexities at step 0 are those of the source's exported weights, by plain transformers."""
    runs = source.parent / "runs"
    own: dict[str, Any] = {"data": {"path": str(short_shards), "sequence_length": 32, "validation_samples": 12}}
    own |= {"train": {"global_batch_samples": 4}, "stop": {"steps": 1}, "optimizer": {"warmup_steps": 0}}
    config = fork(source, workspace, name="phase", init_from=str(runs / "source"), init_as="phase", **own)
    run_ranks(f"{WORKER}go_on", 2, timeout_s=300, config_path=str(config), name="phase")
    before = [domain["student_ppl_before"] for domain in read_summary(runs / "phase")["domains"]]
    assert before == pytest.approx(perplexities(runs / "source/export", short_shards), rel=1e-5)
    steps = [line for line in without_clock(runs / "phase") if line["kind"] == "step"]
    assert [(line["step"], sum(line["domain_tokens"])) for line in steps] == [(1, 4 * 31)]
    assert steps[0]["learning_rate"] == pytest.approx(5e-3)  # the schedule's own first step
    for rank in (0, 1):
        (old, updates), (new, more) = (
            moments(runs / run / f"checkpoints/step-{step:08d}", rank) for run, step in (("source", 6), ("phase", 1))
        )
        assert (updates, more) == (6.0, 7.0)
        assert (new >= 0.95 * old * (1 - 1e-6)).all() and (new > 0.95 * old).any()  # beta_2 v + (1 - beta_2) g^2


def test_a_phase_does_not_read_the_same_samples_again(source: Path, workspace: Path) -> None:
    config = load_config(str(fork(source, workspace, name="again", init_as="phase")), [])
    with pytest.raises(CheckpointError, match="read them in the same order again: set another seed"):
        run_identity(config, check_inputs(config, SingleProcess()).fingerprints)


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
