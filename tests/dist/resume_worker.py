"""Functions for every rank of test_resume.py and others: runs that break off at a line of the ledger and resume."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.config import load_config
from ddk_ds.data.readers import Readers
from ddk_ds.engine.runtime import Runtime
from ddk_ds.train.checkpoint.restore import Start, find_start
from ddk_ds.train.inputs import check_inputs
from ddk_ds.train.loop import train
from ddk_ds.train.run import Run
from ddk_ds.train.run_dir import claim_run_dir, run_identity
from ddk_ds.train.setup import prepare_run
from ddk_ds.train.watchdog import Watchdog


class BreakOff(Exception):
    """Stands in for the end of the process."""


def break_and_resume(runtime: Runtime, config_path: str, names: dict[str, int | None]) -> list[str]:
    """Run once for each name, broken off after that many ledger lines (None: not at all); return as `run_all` does."""
    return run_all(runtime, [(config_path, name, lines) for name, lines in names.items()])


def run_all(runtime: Runtime, starts: list[tuple[str, str, int | None]]) -> list[str]:
    """Run each (configuration, name, ledger lines after which it breaks off and is resumed), one after the other.

    Return the names of the runs that broke off.
    """
    broken = []
    for config_path, name, lines in starts:
        try:
            train(prepare(runtime, config_path, name, lines))
        except BreakOff:
            train(prepare(runtime, config_path, name, None))
            broken.append(name)
    return broken


def teacher_perplexities(runtime: Runtime, config_paths: list[str]) -> list[list[float]]:
    """Start a run of each configuration, up to its first step; return the teacher's perplexities of each."""
    found = []
    for number, config_path in enumerate(config_paths):
        ppl = prepare(runtime, config_path, f"run-{number}").teacher_ppl
        assert ppl is not None
        found.append(ppl.tolist())
    return found


def save_where_nothing_can_be_written(runtime: Runtime, config_path: str) -> list[str]:
    """Save a checkpoint below a file; return why each rank could not write, or "". Collective."""
    student = prepare(runtime, config_path, "unsaved").student
    student.save(Path("/dev/null/checkpoint"), "state", {}, background=True)
    return runtime.comm.gather_objects(student.wait_for_save()[1])


def break_off(runtime: Runtime, config_path: str, name: str, lines: int) -> None:
    """Train until that many lines of the ledger are written."""
    with contextlib.suppress(BreakOff):
        train(prepare(runtime, config_path, name, lines))


def go_on(runtime: Runtime, config_path: str, name: str) -> None:
    """Train the run to its end."""
    train(prepare(runtime, config_path, name))


def change_over(runtime: Runtime, config_paths: list[str], name: str, lines: int) -> None:
    """Train until that many lines of the ledger are written, and then to the end under the second configuration."""
    break_off(runtime, config_paths[0], name, lines)
    go_on(runtime, config_paths[1], name)


def go_on_counting(runtime: Runtime, config_path: str, name: str, lines: int | None = None) -> dict[str, list[int]]:
    """Train on, to the end or until that many lines of the ledger are written.

    Return the bytes that each rank read from files while it verified the checkpoint, and while it loaded it.
    """
    read_bytes: dict[str, int] = {}

    def counted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any) -> Any:
            before = _read_bytes()
            result = function(*arguments)
            read_bytes[what] = _read_bytes() - before
            return result

        return counting

    checkpoints = run_dir(config_path, name) / "checkpoints"
    files = set(checkpoints.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddk_ds.train.setup.find_start", counted("verified", find_start))
        patch.setattr(Start, "load", counted("loaded", Start.load))
        run = prepare(runtime, config_path, name, lines)
    assert set(checkpoints.rglob("*")) == files, "a copy in another form was written"
    runtime.comm.barrier()
    with contextlib.suppress(BreakOff):
        train(run)
    return {what: runtime.comm.gather_objects(number) for what, number in read_bytes.items()}


def _read_bytes() -> int:
    """What this process has read by system calls so far; what it reads from a mapped file is not counted."""
    (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(line.split()[1])


def prepare(runtime: Runtime, config_path: str, name: str, lines: int | None = None) -> Run:
    """Return a run that is ready to train; it breaks off after that many lines of its ledger (None: not at all)."""
    config = load_config(config_path, [f"name={name}"])
    inputs = check_inputs(config, runtime.comm)
    identity = run_identity(config, inputs.fingerprints)
    if runtime.comm.rank == 0:
        claim_run_dir(config, identity)
    runtime.comm.barrier()
    run = prepare_run(config, inputs, identity, runtime, Watchdog(config.limits), Readers(0))
    if lines is not None:
        _break_after(run, lines)
    return run


def _break_after(run: Run, lines: int) -> None:
    write, written = run.ledger.write, 0

    def counted(record: dict[str, Any]) -> None:
        nonlocal written
        write(record)
        written += 1
        if written == lines:
            raise BreakOff(json.dumps(record["kind"]))

    run.ledger.write = counted  # type: ignore[method-assign]


def run_dir(config_path: str, name: str) -> Path:
    """Return the directory of the run with that name."""
    return load_config(config_path, [f"name={name}"]).run_dir
