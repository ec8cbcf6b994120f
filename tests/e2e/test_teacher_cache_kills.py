"""Ranks that are killed while they fill a cache of their teacher: what is there in the end is whole, and the same."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ddk_ds.data.teacher_place import PARTS, SAMPLES_FILE
from ddk_ds.data.teacher_samples import Said
from tests.dist.ranks import killed_ranks, run_ranks
from tests.dist.teacher_cache_worker import all_samples
from tools.bench.small_run import write_config

WORKER = "tests.dist.teacher_cache_worker:"
KILLS = 10
STEPS = 6 * KILLS


@pytest.mark.long("24 starts of 1 to 4 ranks")
def test_killed_at_any_time(workspace: Path, tmp_path: Path) -> None:
    """20 kills at random moments, on another number of ranks after each: nothing is lost, nothing is there twice."""
    rng = random.Random(4)

    def config(name: str, samples: int = 8) -> str:
        teacher = {"path": str(workspace / "teacher"), "cache": {"path": str(cache_of(name)), "draws": 16}}
        mixture = {"interval_steps": 4, "controller": "equal", "ratio_cap": None, "initial_floor": 0.0}
        options = {"data": {"validation_samples": 2}, "stop": {"steps": STEPS}, "checkpoint": {"every_steps": 3}}
        train = {"global_batch_samples": samples}
        return str(write_config(workspace, tmp_path / name, teacher=teacher, mixture=mixture, train=train, **options))

    def cache_of(name: str) -> Path:
        return tmp_path / f"{name}-cache"

    def kill_and_go_on(function: str, path: str, progress: Callable[[], int], worlds: list[int]) -> None:
        for _ in range(KILLS):
            moment = after(progress, progress() + rng.randint(1, 2), rng.uniform(0.0, 0.05))
            assert killed_ranks(WORKER + function, rng.choice(worlds), moment, path=path), "it came to its end"
        run_ranks(WORKER + function, rng.choice(worlds), path=path)

    def parts() -> int:
        folder = cache_of("filled") / PARTS
        return len(list(folder.iterdir())) if folder.is_dir() else 0

    def steps() -> int:
        ledger = tmp_path / "trained/runs/run/ledger.jsonl"
        return ledger.read_text().count('"kind": "step"') if ledger.is_file() else 0

    run_ranks(WORKER + "train_on", 1, path=config("whole-run"))
    kill_and_go_on("train_on", config("trained"), steps, [1, 2, 4])
    drawn = all_samples(cache_of("whole-run"))
    assert_equal(all_samples(cache_of("trained")), drawn)
    assert max(counts(cache_of("trained")).values()) == 1

    run_ranks(WORKER + "teach_each", 1, configs=[config("whole")], samples=400)
    kill_and_go_on("fill_in_small_parts", config("filled", 24), parts, [1, 2, 3, 4])  # 3 ranks need a multiple
    whole = all_samples(cache_of("whole"))
    assert_equal(all_samples(cache_of("filled")), whole)
    # The last micro-batches of a start are filled up with its last sample.
    assert sum(counts(cache_of("filled")).values()) < len(whole) + 4 * 2
    both = drawn.keys() & whole.keys()
    assert_equal({place: drawn[place] for place in both}, {place: whole[place] for place in both})


def after(progress: Callable[[], int], goal: int, seconds: float) -> Callable[[], bool]:
    """Return a function that returns True so long after the progress has come to the goal."""
    return lambda: progress() >= goal and not time.sleep(seconds)


def assert_equal(found: dict[tuple[str, int], Said], expected: dict[tuple[str, int], Said]) -> None:
    assert found.keys() == expected.keys() and len(found) > 100
    for place, said in expected.items():
        assert all(map(np.array_equal, said, found[place])), place


def counts(cache: Path) -> Counter[tuple[str, int]]:
    """Return how often each sample is in complete parts."""
    entries = [json.loads(path.read_text())["domains"] for path in (cache / PARTS).glob(f"[!.]*/{SAMPLES_FILE}")]
    return Counter((domain, number) for entry in entries for domain in entry for number in entry[domain]["numbers"])
