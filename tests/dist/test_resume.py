"""A run that is interrupted at any line of its ledger and resumed has the uninterrupted run's ledger, bit for bit."""

from __future__ import annotations

from pathlib import Path

from tests.dist.ranks import run_ranks
from tests.dist.resume_worker import run_dir
from tools.bench.small_run import without_clock, write_config


def test_interrupted_anywhere(workspace: Path, tmp_path: Path) -> None:
    # 3 intervals of 2 steps, a checkpoint every 2 steps. Broken off before the first checkpoint, at borders and in the
    # middle of intervals, and at the end.
    config = write_config(
        workspace, tmp_path, mixture={"interval_steps": 2}, stop={"steps": 6}, checkpoint={"every_steps": 2}
    )
    uninterrupted = 3 + 6 + 1
    names: dict[str, int | None] = {"whole": None}
    breaks = (2, 4, 9, uninterrupted)
    names |= {f"broken-{lines}": lines for lines in breaks}
    done = run_ranks(
        "tests.dist.resume_worker:break_and_resume", 2, timeout_s=400, config_path=str(config), names=names
    )
    assert done == [f"broken-{lines}" for lines in breaks]
    whole = without_clock(run_dir(str(config), "whole"))
    assert len(whole) == uninterrupted
    for name in done:
        assert without_clock(run_dir(str(config), name)) == whole, name
