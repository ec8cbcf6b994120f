"""On a device that computes only when the host waits for it, at most the planned weights are gathered at a time."""

from __future__ import annotations

from pathlib import Path

from tests.dist.ranks import run_ranks


def test_the_host_is_held_at_each_gather(tmp_path: Path) -> None:
    """In the teacher's pass, the student's forward, recomputation and backward, with whole layers and without."""
    for case in run_ranks("tests.dist.host_lead_worker:gathered", 2, folder=str(tmp_path)):
        for model, most in case["most"].items():
            assert most <= case["bounds"][model] < 0.6 * case["layers"], f"{model}: {case}"
