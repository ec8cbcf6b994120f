"""Ranks that are killed while they fill a cache of their teacher: what is there in the end is whole, and the same."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest

from ddk_ds.data.teacher_place import PARTS
from tests.dist.teacher_cache_worker import all_samples
from tests.e2e.direct_ranks import Ranks
from tools.bench.small_run import without_clock, write_config

KILLS = 5


@pytest.mark.long("seven starts of two ranks")
def test_killed_at_any_time(workspace: Path, tmp_path: Path) -> None:
    rng = random.Random(4)
    ends = {}
    for name, kills in (("whole", 0), ("killed", KILLS)):
        teacher = {"path": str(workspace / "teacher"), "cache": {"path": str(tmp_path / f"{name}-cache"), "draws": 16}}
        config = write_config(
            workspace, tmp_path / name, teacher=teacher, mixture={"interval_steps": 2}, stop={"steps": 16}
        )
        run = tmp_path / name / "runs/run"
        for kill in range(kills):
            ranks = Ranks(config, tmp_path / name)
            wait_for_step(ranks, run / "ledger.jsonl", 3 * kill + 1)
            time.sleep(rng.uniform(0.0, 0.5))  # a step, the writing of a part, a checkpoint
            for process in ranks.processes:
                process.kill()
            ranks.wait(60)
        ranks = Ranks(config, tmp_path / name)
        assert ranks.wait(300) == [0, 0], ranks.text
        ends[name] = without_clock(run), all_samples(tmp_path / f"{name}-cache")
        folder = tmp_path / f"{name}-cache" / PARTS
        assert all((part / "index.json").is_file() for part in folder.iterdir() if not part.name.startswith("."))
    (ledger, samples), (killed_ledger, killed_samples) = ends["whole"], ends["killed"]
    assert killed_ledger == ledger
    assert killed_samples.keys() == samples.keys()
    for place, said in samples.items():
        assert all(map(np.array_equal, said, killed_samples[place])), place


def wait_for_step(ranks: Ranks, ledger: Path, step: int) -> None:
    end = time.monotonic() + 300
    while f'"step": {step},' not in (ledger.read_text() if ledger.is_file() else ""):
        assert ranks.processes[0].poll() is None and time.monotonic() < end, ranks.text
        time.sleep(0.02)
