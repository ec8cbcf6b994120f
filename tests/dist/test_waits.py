"""The host waits for the device once in a step: where DeepSpeed decides whether the gradient is finite."""

from __future__ import annotations

from pathlib import Path

from tests.dist.ranks import run_ranks
from tools.bench.small_run import write_config


def test_a_step_waits_once_for_the_device(workspace: Path, tmp_path: Path) -> None:
    """A complete step with its agreement, ledger and next micro-batches, on a device that is only kept in books.

    Brakes are not counted: events of work that lies layers back, which leave the device something to do.
    """
    zero = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    options = {"stop": {"steps": 7}, "mixture": {"interval_steps": 7}, "checkpoint": {"every_steps": 100}}
    config = write_config(workspace, tmp_path, deepspeed=zero, **options)
    counts = run_ranks("tests.dist.waits_worker:count", 2, config_path=str(config))
    assert len(counts) == 9  # the interval's line, seven steps, the last measurement
    for step in counts[3:8]:  # ZeRO-3 records its trace in the first steps
        assert step == {"__bool__ in deepspeed/runtime/utils.py": 1}, counts
