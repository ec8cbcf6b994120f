"""Functions for every rank of test_teacher_cache_runs.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.config import load_config
from ddk_ds.data.readers import Readers
from ddk_ds.data.teacher_cache import CONDITIONS_FILE, TeacherCache
from ddk_ds.data.teacher_place import PARTS, SAMPLES_FILE, LocalPlace
from ddk_ds.data.teacher_samples import Said
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.teacher import Teacher
from ddk_ds.errors import TemporaryError, UserError
from ddk_ds.methods.cached_distillation import CachedDistillation
from ddk_ds.train.inputs import check_inputs
from ddk_ds.train.loop import train
from ddk_ds.train.run_dir import run_identity
from ddk_ds.train.teach import fill_cache
from ddk_ds.train.watchdog import Watchdog
from tests.dist.resume_worker import BreakOff, prepare
from tests.kept import said_of


def runs(runtime: Runtime, starts: list[tuple[str, int | None]], names: list[str]) -> dict[str, int]:
    """Run each configuration under a name, broken off after some lines and resumed; count passes of the teacher."""
    counts = {}
    for (path, lines), name in zip(starts, names, strict=True):
        passes: list[int] = []
        original = Teacher.hidden

        def counted(self: Teacher, *given: Any, passes: list[int] = passes, original: Any = original) -> Any:
            passes.append(len(given[0]))
            return original(self, *given)

        try:
            run = prepare(runtime, path, name, lines)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Teacher, "hidden", counted)
                train(run)
        except BreakOff:
            train(prepare(runtime, path, name, None))
        counts[name] = len(passes)
    return counts


def teach(runtime: Runtime, config_path: str, samples: list[float], break_after: int) -> list[Any]:
    """Fill the cache with so many samples of each domain, one number after the other; then all, broken off once.

    Return what each call says, and the numbers of samples that rank 0 added before the break and after it.
    """
    config = load_config(config_path, [])
    inputs = check_inputs(config, runtime.comm)
    identity = run_identity(config, inputs.fingerprints)

    def fill(number: float) -> str:
        return fill_cache(config, inputs, identity, runtime, Watchdog(config.limits), Readers(0), number)

    said: list[Any] = [fill(number) for number in samples]
    added: list[tuple[str, int]] = []
    original = TeacherCache.add

    def counted(self: TeacherCache, domain: str, number: int, one: Said) -> None:
        original(self, domain, number, one)
        added.append((domain, number))
        if len(added) == break_after:
            raise BreakOff

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddk_ds.data.teacher_cache.PART_BYTES", 30_000)
        patch.setattr(TeacherCache, "add", counted)
        with pytest.raises(BreakOff):
            fill(math.inf)
        before = len(added)
        said.append(fill(math.inf))
    return [*said, before, len(added) - before, fill(math.inf)]


def teach_each(runtime: Runtime, configs: list[str], samples: float) -> list[str]:
    """Fill the cache of each configuration with so many samples of each domain; return what is said of it.

    Overrides can stand behind a configuration's path, after spaces.
    """
    said = []
    for text in configs:
        path, *overrides = text.split()
        config = load_config(path, overrides)
        inputs = check_inputs(config, runtime.comm)
        identity = run_identity(config, inputs.fingerprints)
        lines: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ddk_ds.train.progress.RunProgress.say", lambda _, text, lines=lines: lines.append(text))
            done = fill_cache(config, inputs, identity, runtime, Watchdog(config.limits), Readers(0), samples)
        said.append("\n".join([done, *lines]))
    return said


def fill_in_small_parts(runtime: Runtime, path: str) -> None:
    """Fill the cache of a configuration with 400 samples of each domain, in about 60 parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddk_ds.data.teacher_cache.PART_BYTES", 12_000)
        teach_each(runtime, [path], 400)


def train_on(runtime: Runtime, path: str) -> None:
    """Train the run of a configuration from its newest checkpoint to its end."""
    train(prepare(runtime, path, "run", None))


def teaching_error(runtime: Runtime, path: str) -> str:
    """Fill a cache whose store goes down meanwhile; return this rank's error."""
    with pytest.raises(TemporaryError) as error:
        teach_each(runtime, [path], 3)
    return str(error.value)


def training_error(runtime: Runtime, path: str) -> str:
    """Train a run whose store goes down while a first part is uploaded, in a step; return this rank's error."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TemporaryError) as error:
        patch.setattr("ddk_ds.data.teacher_cache.PART_BYTES", 1)
        train(prepare(runtime, path, "run", None))
    return str(error.value)


def errors(runtime: Runtime, first: str, configs: list[str]) -> list[str]:
    """Run `first`, then try each of the others; return their errors."""
    train(prepare(runtime, first, "first", None))
    return _errors(runtime, configs)


def teachers_by_domain(runtime: Runtime, fills: list[str], reading: str, wrong: list[str]) -> dict[str, Any]:
    """Fill a cache by each of `fills`, run `reading` on it and try each of `wrong`.

    Return the run's perplexities of the teachers, the places of the samples of its first step, and the errors.
    """
    teach_each(runtime, fills, 24)  # as many as three steps draw in all
    places: list[Any] = []
    original = CachedDistillation.fill

    def recorded(self: CachedDistillation, batches: Any) -> Any:
        places.extend(self._cached.places(batch.sample_id) for batch in batches)
        return original(self, batches)

    run = prepare(runtime, reading, "reading", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CachedDistillation, "fill", recorded)
        train(run)
    assert run.teacher_ppl is not None
    first_step = places[: run.config.micro_batches(runtime.comm.world_size)]
    of_ranks = runtime.comm.gather_objects([place for of_batch in first_step for place in of_batch])
    return {
        "teacher_ppl": run.teacher_ppl.tolist(),
        "places": [place for of_rank in of_ranks for place in of_rank],
        "errors": _errors(runtime, wrong),
    }


def _errors(runtime: Runtime, configs: list[str]) -> list[str]:
    """Start a run of each configuration; return their errors, "" for none."""
    found = []
    for number, path in enumerate(configs):
        try:
            train(prepare(runtime, path, f"run-{number}", None))
            found.append("")
        except UserError as error:
            found.append(str(error))
    return found


def all_samples(path: Path) -> dict[tuple[str, int], Said]:
    """Return all that the parts of a cache hold."""
    conditions = json.loads((path / CONDITIONS_FILE).read_text())
    del conditions["format"]
    del conditions["xxh64"]
    cache = TeacherCache(LocalPlace(path), conditions, {}, conditions["vocab_size"])
    found: dict[tuple[str, int], Said] = {}
    for part in (path / PARTS).iterdir():
        if part.name.startswith("."):  # begun by a process that was killed
            continue
        for domain, entry in json.loads((part / SAMPLES_FILE).read_text())["domains"].items():
            for number in entry["numbers"]:
                record = cache.read(domain, number)
                assert record is not None
                found[domain, number] = said_of(cache.coding, record, conditions["sequence_length"])
    return found
