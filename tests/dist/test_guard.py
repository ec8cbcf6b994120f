"""A step whose gradient is not finite on one rank is skipped on all; too many end the run or roll it back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dist.ranks import run_ranks
from tools.bench.small_run import without_clock, write_config


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


@pytest.mark.long("two runs, 22 s of CPU; the decisions have unit tests")
def test_back_to_the_last_checkpoint_and_past_the_samples(workspace: Path, tmp_path: Path) -> None:
    # Intervals of 4 steps. Steps 5 and 6 have no finite gradient: back to step 3, and the samples of steps 4 to 6 are
    # left out: the rest of the first interval, and half of the second.
    options = {"stop": {"steps": 9}, "guard": {"max_skipped_steps": 1, "roll_backs": 1}}
    config = write_config(workspace, tmp_path, **options, checkpoint={"every_steps": 3, "in_background": False})
    worker, poisoned = "tests.dist.guard_worker:poison", [5, 6]
    for name, lines in {"whole": None, "cut": 10}.items():  # cut after the roll-back, before the next checkpoint
        arguments = {"config_path": str(config), "name": name, "steps": poisoned}
        done = run_ranks(worker, 2, timeout_s=300, **arguments, lines=lines)
        assert done == ("finished" if lines is None else "broken off")
    assert run_ranks(worker, 2, timeout_s=300, **arguments) == "finished"
    records = without_clock(tmp_path / "runs/whole")
    assert records == without_clock(tmp_path / "runs/cut")
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, 10))
    assert [record["interval"] for record in steps] == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert all(record["loss"] is not None for record in steps)
    (entry,) = json.loads((tmp_path / "runs/whole/roll_backs.json").read_text())
    assert (entry["step"], entry["failed_step"], entry["skip_until"]) == (3, 6, 48)
    assert "roll_back" in [json.loads(line)["event"] for line in (tmp_path / "runs/cut/events.jsonl").open()]
