"""A gradient that is not finite on one rank: the step is skipped on all, and too many end the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dist.ranks import run_ranks
from tests.workspace import without_clock, write_config


@pytest.mark.parametrize(("poisoned", "outcome"), [([3], "finished"), ([3, 4, 5], "not finite in 3 steps in a row")])
def test_steps_without_a_finite_gradient(workspace: Path, tmp_path: Path, poisoned: list[int], outcome: str) -> None:
    options = {"stop": {"steps": 6}, "checkpoint": {"every_steps": 2}, "guard": {"max_skipped_steps": 2}}
    config = write_config(workspace, tmp_path, **options)
    worker = "tests.dist.guard_worker:poison"
    done = run_ranks(worker, 2, timeout_s=300, config_path=str(config), name="poisoned", steps=poisoned)
    assert outcome in done
    run_dir = tmp_path / "runs/poisoned"
    steps = [record for record in without_clock(run_dir) if record["kind"] == "step"]
    assert [record["step"] for record in steps if record["loss"] is None] == poisoned
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds.count("skipped") == min(len(poisoned), 2)
    assert ("stopped" in kinds) == (outcome != "finished") and ("end" in kinds) == (outcome == "finished")
    later = [record["loss"] for record in steps if record["step"] > max(poisoned)]
    assert all(loss < 20 for loss in later)
