"""A rank that stops answering: both write where they wait, and the job ends; one that is slow alone does no harm."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.direct_ranks import Ranks
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
        waiting.wait(timeout=120)  # its limit, and the seconds that it leaves to the other one
        # Else DeepSpeed's launcher, which has sent SIGTERM, would kill it after 30 s.
        hung.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode != 0 and time.monotonic() - stopped < 180, output[-3000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "rank 0: step after step" in output and "limits.step_s sets the time" in output
    stacks = (run_dir / "stacks/rank-0.txt").read_text()
    assert stacks.startswith("step after step ") and "Timeout (0:00:10)" in stacks
    waits = ("all_reduce", "reduce_scatter", "all_gather", "fetch_sub_module")  # the last: for a gather to arrive
    assert any(place in stacks for place in waits), stacks


@pytest.mark.long("it waits for a limit of a minute; tests/unit/train/test_watchdog_limits.py has the phases")
def test_a_disk_that_hangs_before_the_training(workspace: Path, tmp_path: Path) -> None:
    """The rank that hangs names its phase and its place, and so does the one that waits for it.

    The models are loaded after the restoring, in which the other rank could still be.
    """
    config = write_config(workspace, tmp_path, limits={"start_s": 60.0, "checkpoint_s": 60.0})
    ranks = Ranks(config, tmp_path, {"SLOW_FILE": "/validation/shard.", "SLOW_S": "10000"})
    assert ranks.wait(300) == [1, 1], ranks.text
    assert all(f"rank {rank}: models after step 0, at most 60 s: not done" in ranks.text for rank in range(2)), (
        ranks.text
    )
    stacks = (tmp_path / "runs/run/stacks/rank-1.txt").read_text()
    assert "Timeout (0:01:00)" in stacks and "direct_ranks.py" in stacks, stacks


@pytest.mark.long("it outlasts a timeout of a minute; tests/dist/test_runtime.py looks at the timeouts of all groups")
def test_a_disk_that_is_slow_on_one_rank_does_not_end_the_run(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank waits in a collective for longer than DeepSpeed's timeout, which is set to a minute here."""
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "1")
    config = write_config(workspace, tmp_path, stop={"steps": 4})
    slow = {"SLOW_FILE": "/validation/shard.", "SLOW_S": "70", "SLOW_ONCE": "1"}
    ranks = Ranks(config, tmp_path, slow, anew=True)  # the timeout is read when DeepSpeed is imported
    assert ranks.wait(400) == [0, 0], ranks.text
