"""The fault campaign recognises intact checkpoints, resumed runs and identical ledgers in files made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddk_ds.files import size_and_xxh64
from tools.bench.fault_campaign import Outcome, compare, resumed_from, summary
from tools.bench.faults import KINDS, MOMENTS, intact_checkpoints


def write_ledger(run_dir: Path, *losses: float, tokens: int = 7) -> Path:
    """Write a ledger with these losses, and return the run's directory."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = [{"kind": "step", "loss": loss, "domain_tokens": [tokens], "clock": {"step_s": loss}} for loss in losses]
    (run_dir / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def test_ledgers_are_compared_to_the_last_digit(tmp_path: Path) -> None:
    reference = write_ledger(tmp_path / "a", 2.0, 1.0)
    assert compare(write_ledger(tmp_path / "b", 2.0, 1.0), reference) == (0.0, True)
    assert compare(write_ledger(tmp_path / "c", 2.0, 1.00001), reference) == (pytest.approx(1e-5), True)
    assert compare(write_ledger(tmp_path / "d", 2.0, 1.0, tokens=8), reference) == (0.0, False)
    assert not compare(write_ledger(tmp_path / "e", 2.0), reference)[1]


def test_a_checkpoint_is_whole_by_its_hashes(tmp_path: Path) -> None:
    for step, content in ((1, b"whole"), (2, b"harmed")):
        directory = tmp_path / f"checkpoints/step-{step}"
        directory.mkdir(parents=True)
        (directory / "shard").write_bytes(content)
        files = {"shard": size_and_xxh64(directory / "shard")}
        (directory / "manifest.json").write_text(json.dumps({"files": files}))
    (directory / "shard").write_bytes(b"harmes")
    (tmp_path / "checkpoints/step-3").mkdir()
    assert [path.name for path in intact_checkpoints(tmp_path)] == ["step-1"]


def test_only_the_last_start_counts(tmp_path: Path) -> None:
    events = [{"event": "resume", "path": "step-2", "time_s": 10.0}, {"event": "end", "time_s": 11.0}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert resumed_from(tmp_path, since=9.0) == Path("step-2")
    assert resumed_from(tmp_path, since=10.5) is None
    assert resumed_from(tmp_path / "never begun", since=0.0) is None


def test_the_summary_counts_what_went_wrong() -> None:
    good = Outcome("rank killed", "training", "", (2, 2), 1, 2.0, True, 4, True, 0.0, False, False)
    bad = Outcome("all killed", "export", "", (2, 1), None, 60.0, False, 0, False, float("nan"), True, True)
    counts = {key: value for key, value in summary([good, bad, good]).items() if key != "faults"}
    assert counts == {
        **{"runs": 3, "resumed": 2, "identical": 2, "hangs": 1, "partial_checkpoints_loaded": 1},
        "slowest_end_s": 60.0,
    }
    assert set(KINDS) == set(MOMENTS)
