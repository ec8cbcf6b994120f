"""A rank that stops answering: the others write where they wait, and the job ends."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.test_interruption import rank_of
from tests.e2e.test_run import start, wait_for_step
from tools.bench.small_run import write_config


@pytest.mark.long("a start that waits for the time limit of a hang")
def test_a_rank_that_hangs_ends_the_job_with_the_stacks_of_the_others(workspace: Path, tmp_path: Path) -> None:
    options = {"stop": {"steps": 100_000}, "mixture": {"interval_steps": 100_000}, "limits": {"step_s": 10.0}}
    config = write_config(workspace, tmp_path, name="hung", checkpoint={"every_steps": 100_000}, **options)
    run_dir = tmp_path / "runs/hung"
    process = start(config)
    try:
        wait_for_step(process, run_dir / "ledger.jsonl", 3)
        waiting, hung = rank_of(process, 0), rank_of(process, 1)
        hung.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        waiting.wait(timeout=30)  # its limit
        # Else DeepSpeed's launcher, which has sent SIGTERM, would kill it after 30 s.
        hung.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode != 0 and time.monotonic() - stopped < 60, output[-3000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    stacks = (run_dir / "stacks/rank-0.txt").read_text()
    assert stacks.startswith("step after step ") and "Timeout (0:00:10)" in stacks
    assert "all_reduce" in stacks or "reduce_scatter" in stacks or "all_gather" in stacks, stacks
