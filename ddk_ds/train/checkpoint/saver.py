"""Writing checkpoints while training continues: under a temporary name, completed by a manifest, then renamed.

A write that fails leaves the run and the older checkpoints as they were.
"""

from __future__ import annotations

import shutil
import time
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
    Manifest,
    delete_old,
    newest_checkpoint,
    put_in_place,
    read_manifest,
    remove_partial,
)
from ddk_ds.train.state import RunState
from ddk_ds.version import versions

# The next checkpoint needs this many times the size of the last one as free space.
_HEADROOM = 1.05


class SaveFailed(Exception):
    """A checkpoint could not be written; raised on every rank with the same reason. The run can continue."""


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint and the time that it took."""

    path: Path
    step: int
    pause_s: float
    """Seconds that training waited for it."""
    seconds: float
    """Seconds from the beginning of the save to its end."""


class Saver:
    """Writes a run's checkpoints, one at a time."""

    def __init__(self, run_dir: Path, identity: dict[str, Any], comm: Comm, options: Checkpoint) -> None:
        self._run_dir = run_dir
        self._identity = identity
        self._comm = comm
        self._options = options
        self._pending: tuple[Student, Manifest] | None = None
        self._began = self._pause_s = 0.0

    def begin(self, student: Student, state: RunState, ledger: tuple[int, str]) -> bool:
        """Begin a checkpoint of this step; its content is copied by the time this returns. Collective.

        `ledger` are the bytes and the xxh64 of the ledger at this step (`Ledger.position`). Return False if this step
        has a complete checkpoint already. Raises SaveFailed if the save cannot begin.
        """
        assert self._pending is None, "a checkpoint began before the last one was finished"
        self._began = time.perf_counter()
        comm, manifest = self._comm, self._manifest(state.step, *ledger)
        # Rank 0 looks for all ranks: another node may see the shared directory late.
        if comm.broadcast_object(read_manifest(self._final(manifest)) is not None if comm.rank == 0 else None):
            return False
        partial = self._partial(manifest)
        _agree_on_failure(comm, _make_room(self._run_dir, partial) if comm.rank == 0 else "")
        student.save(partial, TAG, state.to_json(), background=self._options.in_background)
        self._pending = student, manifest
        self._pause_s = time.perf_counter() - self._began
        return True

    def ready(self) -> bool:
        """Return True if every rank has written its part, so that `finish` need not wait. Collective."""
        if self._pending is None:
            return False
        student, _ = self._pending
        writing = torch.tensor([float(student.save_pending)], device=student.engine.device)
        return not self._comm.all_reduce_max(writing).item()

    def finish(self) -> Saved | None:
        """Wait for the checkpoint that was begun, complete it, and delete old ones. Collective.

        Return None if none was begun. Raises SaveFailed if it could not be written.
        """
        if self._pending is None:
            return None
        started = time.perf_counter()
        (student, manifest), self._pending = self._pending, None
        partial, final = self._partial(manifest), self._final(manifest)
        self._put_in_place(partial, final, manifest, *student.wait_for_save())
        if self._comm.rank == 0:
            delete_old(self._run_dir / "checkpoints", self._options)
        ended = time.perf_counter()
        return Saved(final, manifest.step, self._pause_s + ended - started, ended - self._began)

    def _put_in_place(
        self, partial: Path, final: Path, manifest: Manifest, paths: dict[Path, Any], failure: str
    ) -> None:
        """Gather what every rank has written into the manifest and put the directory in its place. Collective.

        `paths` are this rank's files with size and hash; `failure` is why writing failed, or "". Raises SaveFailed on
        every rank, after the partial directory is deleted.
        """
        comm, files = self._comm, {str(path.relative_to(partial)): entry for path, entry in paths.items()}
        by_rank = comm.gather_objects((files, failure))
        failure = next((failure for _, failure in by_rank if failure), "")
        if comm.rank == 0:
            manifest.files.update({name: entry for files, _ in by_rank for name, entry in files.items()})
            failure = failure or put_in_place(partial, final, manifest)
            if failure:
                shutil.rmtree(partial, ignore_errors=True)
        _agree_on_failure(comm, failure)

    def _manifest(self, step: int, ledger_bytes: int, ledger_xxh64: str) -> Manifest:
        world_size, made_by = self._comm.world_size, versions()
        return Manifest(FORMAT, step, world_size, ledger_bytes, self._identity, made_by, {}, ledger_xxh64=ledger_xxh64)

    def _final(self, manifest: Manifest) -> Path:
        return self._run_dir / "checkpoints" / f"step-{manifest.step:08d}"

    def _partial(self, manifest: Manifest) -> Path:
        return partial_path(self._final(manifest))


def _agree_on_failure(comm: Comm, failure: str) -> None:
    """Raise SaveFailed on every rank with rank 0's reason, unless that is "". Collective."""
    if reason := comm.broadcast_object(failure):
        raise SaveFailed(reason)


def _make_room(run_dir: Path, partial: Path) -> str:
    """Make the directory `partial` of a new checkpoint and return "".

    Return the reason if it cannot be made, or if the disk has no space for a checkpoint as large as the newest one.
    """
    newest = newest_checkpoint(run_dir)
    needed = 0 if newest is None else int(_HEADROOM * newest[1].num_bytes)
    try:
        remove_partial(run_dir)
        partial.parent.mkdir(exist_ok=True)  # never the run's directory, which somebody may have deleted
        partial.mkdir()
        free = shutil.disk_usage(partial).free
    except OSError as error:
        return str(error)
    return f"{partial.parent} has {free:,} bytes free, a checkpoint takes {needed:,}" if free < needed else ""
