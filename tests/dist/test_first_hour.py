"""The measurements of the first hour on GPUs, on a CPU: they run, and count what a CPU has."""

from __future__ import annotations

from pathlib import Path

from tests.dist.first_hour_worker import MICRO_BATCHES
from tests.dist.ranks import run_ranks

LAYERS = 2


def test_the_first_hours_measurements_run(tmp_path: Path) -> None:
    sizes = {"layers": LAYERS, "hidden": 32, "length": 16}
    found = run_ranks("tests.dist.first_hour_worker:measure", 2, folder=str(tmp_path), **sizes)
    collectives = found["step"]["collectives"]
    assert collectives["_reduce_scatter_base_ float32"] >= MICRO_BATCHES
    assert found["step"]["waits"] == []
    assert found["layer_bytes"] > 2 * 32 * 32
    assert set(found["teacher_pass"]) == {"allocated", "active", "reserved", "retries"}
    assert found["reduction"]["float32"] < 1e-6
    assert found["reduction"]["bfloat16"] > 1e-3
