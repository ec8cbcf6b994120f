"""A step whose gradient is not finite on one rank is skipped on all; too many end the run or roll it back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dist.ranks import run_ranks
from tools.bench.small_run import without_clock, write_config


@pytest.mark.parametrize(
    ("poisoned", "outcome"),
    [
        ([3], "finished"),
        pytest.param(
            *([3, 4, 5], "not finite in 3 steps in a row"),
            marks=pytest.mark.long("a second run; tests/unit/train/test_guard.py has the decision"),
        ),
    ],
)
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


@pytest.mark.long("three runs, 30 s of CPU; the decisions have unit tests")
def test_back_to_before_the_bad_steps_and_past_the_samples(workspace: Path, tmp_path: Path) -> None:
    # Intervals of 4 steps. Steps 6 and 7 have no finite gradient. At step 6 a checkpoint is due, and is not taken; a
    # run that is interrupted there saves it, and does not go back to it. Back to step 3, and the samples of steps 4 to
    # 7 are left out: the rest of the first interval, and three steps of the second.
    options = {"stop": {"steps": 9}, "guard": {"max_skipped_steps": 1, "roll_backs": 1}}
    config = write_config(workspace, tmp_path, **options, checkpoint={"every_steps": 3, "in_background": False})
    worker, poisoned = "tests.dist.guard_worker:poison", [6, 7]
    starts: dict[str, list[tuple[dict[str, int], str]]] = {
        "whole": [({}, "finished")],
        "cut": [({"lines": 11}, "broken off"), ({}, "finished")],  # after the roll-back, before the next checkpoint
        "interrupted": [({"signal_after": 6}, "interrupted"), ({}, "finished")],
    }
    for name, parts in starts.items():
        for more, end in parts:
            arguments = {"config_path": str(config), "name": name, "steps": poisoned, **more}
            assert run_ranks(worker, 2, timeout_s=300, **arguments) == end
        assert without_clock(tmp_path / "runs" / name) == without_clock(tmp_path / "runs/whole"), name
        (entry,) = json.loads((tmp_path / "runs" / name / "roll_backs.json").read_text())
        assert (entry["step"], entry["failed_step"], entry["skip_until"]) == (3, 7, 56), name
    (left_out,) = (tmp_path / "runs/interrupted/checkpoints").glob("broken-*")
    assert left_out.name.startswith("broken-step-00000006-")
    steps = [record for record in without_clock(tmp_path / "runs/whole") if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, 10))
    assert [record["interval"] for record in steps] == [0, 0, 0, 1, 2, 2, 2, 2, 3]
    assert all(record["loss"] is not None for record in steps)
    assert "roll_back" in [json.loads(line)["event"] for line in (tmp_path / "runs/cut/events.jsonl").open()]
