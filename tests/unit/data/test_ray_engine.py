"""`ddk prepare --engine ray` on a Ray with two workers on this machine, of which two are killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from threading import Thread

import pytest

from ddk_ds.data.engines import make_engine
from ddk_ds.data.prepare_parts import prepare_in_parts
from ddk_ds.data.recipe import load_recipe
from tests.unit.data.corpus import PLAN
from tests.unit.data.test_data_prepare import files_of

pytest.importorskip("ray", reason="needs Ray: pip install ray")
pytestmark = pytest.mark.long("a Ray, and an actor for each of nine tasks, a minute")


def actors(root: Path, stage: str) -> list[int]:
    """Return the processes that run parts, once the stage has begun."""
    found = []
    if (root / f"logs/{stage}/executor.json").exists():
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if path.read_bytes().startswith(b"ray::RankWorker.run_for_rank"):
                    found.append(int(path.parent.name))
            except OSError:  # it has ended
                continue
    return found


def wait_for(root: Path, stage: str, count: int) -> list[int]:
    """Wait until a stage runs in so many actors, and return their processes."""
    end = time.monotonic() + 300
    while len(found := actors(root, stage)) < count:
        assert time.monotonic() < end, f"{stage}: {len(found)} actors"
        time.sleep(0.02)
    return found


def test_actors_that_are_killed_run_again(
    recipe_path: Path, tokenizer_dir: Path, tmp_path: Path, prepared: Path
) -> None:
    import ray

    # Ray gives its workers the lowest priority but one, which on a busy machine is none.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, _memory=8 << 30)
    root, ends = tmp_path / ".out.partial", list[bool]()

    def run() -> None:
        engine = make_engine("ray", -1, {})
        prepare_in_parts(load_recipe(recipe_path), tokenizer_dir, tmp_path / "out", PLAN, engine, 3, block_bytes=3000)
        ends.append(True)

    try:
        thread = Thread(target=run, daemon=True)
        thread.start()
        for stage in ("keys", "tokens"):
            os.kill(
                min(wait_for(root, stage, 1)), signal.SIGKILL
            )  # the actor; its own process for the part comes later
        thread.join(timeout=500)
        assert ends
        assert files_of(tmp_path / "out") == files_of(prepared)
    finally:
        ray.shutdown()
