"""Writing checkpoints: under a temporary name, beside the training that goes on, completed by a manifest, renamed.

A write that fails leaves the run and the older checkpoints as they were.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddk_ds.comm import Comm
from ddk_ds.config import Checkpoint
from ddk_ds.engine.student import Student
from ddk_ds.files import partial_path
from ddk_ds.train.checkpoint.checkpoint_files import (
    FORMAT,
    TAG,
    Files,
    Manifest,
    complete,
    delete_old,
    newest_checkpoint,
    read_manifest,
    remove_partial,
)
from ddk_ds.train.state import RunState
from ddk_ds.version import versions

# Of the size of the last checkpoint: free space that the next one must find.
_HEADROOM = 1.05


class SaveFailed(Exception):
    """A checkpoint could not be written; on every rank, with one reason. The run can go on."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete."""

    path: Path
    step: int
    pause_s: float
    """Seconds that training waited."""
    seconds: float
    """From its beginning on."""


class Saver:
    """Writes a run's checkpoints, one at a time."""

    def __init__(self, run_dir: Path, identity: dict[str, Any], comm: Comm, options: Checkpoint) -> None:
        self._run_dir = run_dir
        self._identity = identity
        self._comm = comm
        self._options = options
        self._pending: tuple[Student, Manifest] | None = None
        self._began = self._pause_s = 0.0

    def begin(self, student: Student, state: RunState, ledger_bytes: int) -> bool:
        """Begin a checkpoint of this step; the state is copied when this returns. Collective.

        Returns False if it is there already and complete. Raises SaveFailed where it cannot be begun.
        """
        assert self._pending is None, "a checkpoint began before the last one was finished"
        self._began = time.perf_counter()
        comm, manifest = self._comm, self._manifest(state.step, ledger_bytes)
        # Rank 0 looks for all: another node may see the shared directory late.
        if comm.broadcast_object(read_manifest(self._final(manifest)) is not None if comm.rank == 0 else None):
            return False
        partial = self._partial(manifest)
        agree_on_failure(comm, make_room(self._run_dir, partial) if comm.rank == 0 else "")
        student.save(partial, TAG, state.to_json(), background=self._options.in_background)
        self._pending = student, manifest
        self._pause_s = time.perf_counter() - self._began
        return True

    def ready(self) -> bool:
        """Whether every rank has written what `begin` began, so that `finish` need not wait. Collective."""
        if self._pending is None:
            return False
        student, _ = self._pending
        writing = torch.tensor([float(student.save_pending)], device=student.engine.device)
        return not self._comm.all_reduce_max(writing).item()

    def finish(self) -> Saved | None:
        """Wait for the checkpoint that was begun, complete it, delete old ones. None: none was begun. Collective.

        Raises SaveFailed where it could not be written.
        """
        if self._pending is None:
            return None
        started = time.perf_counter()
        (student, manifest), self._pending = self._pending, None
        partial, final = self._partial(manifest), self._final(manifest)
        finish_directory(self._comm, partial, final, manifest, student.wait_for_save)
        if self._comm.rank == 0:
            delete_old(self._run_dir / "checkpoints", self._options)
        ended = time.perf_counter()
        return Saved(final, manifest.step, self._pause_s + ended - started, ended - self._began)

    def _manifest(self, step: int, ledger_bytes: int) -> Manifest:
        return Manifest(FORMAT, step, self._comm.world_size, ledger_bytes, self._identity, versions(), {})

    def _final(self, manifest: Manifest) -> Path:
        return self._run_dir / "checkpoints" / f"step-{manifest.step:08d}"

    def _partial(self, manifest: Manifest) -> Path:
        return partial_path(self._final(manifest))


def finish_directory(
    comm: Comm,
    partial: Path,
    final: Path,
    manifest: Manifest,
    written: Callable[[], tuple[dict[Path, tuple[int, str]], str]],
) -> None:
    """Gather what every rank has `written` into the manifest and put the directory in its place. Collective.

    Raises SaveFailed on every rank; what was written is gone then.
    """
    paths, failure = written()
    found = comm.gather_objects(({str(path.relative_to(partial)): entry for path, entry in paths.items()}, failure))
    failure = next((failure for _, failure in found if failure), "")
    if comm.rank == 0:
        files: Files = {name: entry for files, _ in found for name, entry in files.items()}
        manifest.files.update(files)
        failure = failure or complete(partial, final, manifest)
        if failure:
            shutil.rmtree(partial, ignore_errors=True)
    agree_on_failure(comm, failure)


def agree_on_failure(comm: Comm, failure: str) -> None:
    """Raise SaveFailed on every rank with rank 0's reason, if there is one. Collective."""
    if reason := comm.broadcast_object(failure):
        raise SaveFailed(reason)


def make_room(run_dir: Path, partial: Path) -> str:
    """Make the directory of a checkpoint that is as large as the newest; why that is not possible, or ""."""
    newest = newest_checkpoint(run_dir)
    needed = 0 if newest is None else int(_HEADROOM * newest[1].num_bytes)
    try:
        remove_partial(run_dir)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
    except OSError as error:
        return str(error)
    return f"{partial.parent} has {free:,} bytes free, a checkpoint takes {needed:,}" if free < needed else ""
