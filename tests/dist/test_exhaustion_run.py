"""Domains with limits in a run: their lines of the ledger, a resume with other micro-batches, the end by `stop`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_ds.commands.distill_rank import main
from tests.dist.ranks import run_ranks
from tools.bench.small_run import without_clock, write_config

SHARES = {"python": 0.25, "cpp": 0.25, "mathematics": 0.5}


def limited(workspace: Path, folder: Path, policy: str, micro_batch: int, samples: int) -> Path:
    """Write the configuration of three intervals of 16 samples, with a limit of `samples` on mathematics."""
    manifest = json.loads((workspace / "shards" / "domains.json").read_text())
    passes = (samples + 0.5) / manifest["domains"]["mathematics"]["train"]["samples"]
    mixture: dict[str, Any] = {"controller": "static", "proportions": SHARES, "interval_steps": 2}
    mixture |= {"exhaustion_by_domain": {"mathematics": policy}, "max_passes": passes}
    return write_config(
        workspace,
        folder,
        mixture=mixture,
        train={"micro_batch_samples": micro_batch},
        stop={"steps": 6},
        checkpoint={"every_steps": 1},
        output_dir=str(folder.parent / "runs"),
    )


@pytest.mark.long("four runs, 13 s of CPU; the policies have unit tests")
def test_limited_runs(workspace: Path, tmp_path: Path) -> None:
    config = limited(workspace, tmp_path / "a", "cap", 2, samples=12)
    other = limited(workspace, tmp_path / "b", "cap", 4, samples=12)
    stop = limited(workspace, tmp_path / "c", "stop", 2, samples=12)
    # The fifth line is the first step of the second interval, in which mathematics comes to its cap.
    paths = {"config_path": str(config), "other_path": str(other), "stop_path": str(stop)}
    reasons = run_ranks("tests.dist.exhaustion_worker:limited_runs", 2, timeout_s=400, **paths, lines=5)
    assert reasons[:2] == ["6 steps done"] * 2
    assert "domain 'mathematics' has 4 of 12 samples left, the next interval asks for 8" in reasons[2]

    whole = without_clock(tmp_path / "runs" / "whole")
    intervals = [record for record in whole if record["kind"] == "interval"]
    assert [list(record["asked"].values()) for record in intervals] == [[4, 4, 8]] * 3
    assert [list(record["counts"].values()) for record in intervals] == [[4, 4, 8], [6, 6, 4], [8, 8, 0]]
    tokens = np.sum([record["domain_tokens"] for record in whole if record["kind"] == "step"], axis=0)
    assert tokens.tolist() == [18 * 63, 18 * 63, 12 * 63]

    # With other micro-batches: the same samples in the same steps, the same numbers but for rounding.
    moved = without_clock(tmp_path / "runs" / "moved")
    assert [record["kind"] for record in moved] == [record["kind"] for record in whole]
    for ours, theirs in zip(moved, whole, strict=True):
        assert ours.get("ids_sha") == theirs.get("ids_sha") and ours["domain_tokens"] == theirs["domain_tokens"]
        if ours["kind"] == "step":
            np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)

    stopped = without_clock(tmp_path / "runs" / "stopped")
    assert [record["kind"] for record in stopped] == ["interval", "step", "step", "end"]
    assert stopped[0]["counts"] == {"python": 4, "cpp": 4, "mathematics": 8} and stopped[-1]["counts"] is None


@pytest.mark.parametrize(
    ("mixture", "parts"),
    [
        ({"exhaustion_by_domain": {"mathematic": "stop"}}, ("exhaustion_by_domain", "'mathematic'", "'mathematics'")),
        ({"exhaustion": "cap", "max_passes": 0.0001}, ("mixture.max_passes", "0.0001", "raise it")),
        ({"exhaustion": "cap", "max_passes": 0.005}, ("mixture.max_passes", "32", "interval_steps")),
    ],
)
def test_policies_that_cannot_work_are_refused_before_a_model_loads(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mixture: dict[str, Any], parts: tuple[str, ...]
) -> None:
    assert main(["--config", str(write_config(workspace, tmp_path, mixture=mixture)), "--dry-run"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    assert all(part in text for part in parts), text
