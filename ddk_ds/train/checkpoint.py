"""Sharded checkpoints: written under a temporary name, completed by a manifest, renamed into place.

    <run>/checkpoints/step-00000500/manifest.json    step, world size, ledger position, every file with its size
    <run>/checkpoints/step-00000500/state/           DeepSpeed's shards; the run's own state is their client state

A directory without a valid manifest is never loaded.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddk_ds.comm import Comm
from ddk_ds.engine.models import Student
from ddk_ds.errors import CheckpointError
from ddk_ds.files import write_text
from ddk_ds.train.state import RunState

FORMAT = 1
_MANIFEST = "manifest.json"
_TAG = "state"
_PARTIAL = ".partial-"
_BROKEN = "broken-"


@dataclass(frozen=True)
class Manifest:
    """What completes a checkpoint."""

    format: int
    step: int
    world_size: int
    ledger_bytes: int
    files: dict[str, int]
    """Path below the checkpoint -> bytes."""


def save_checkpoint(student: Student, state: RunState, run_dir: Path, ledger_bytes: int, comm: Comm) -> Path | None:
    """Write a checkpoint of this step. Collective. Returns its directory.

    Does nothing and returns None if it is there already and complete; an incomplete one in its place is kept under
    another name.
    """
    root = run_dir / "checkpoints"
    final = root / f"step-{state.step:08d}"
    # Rank 0 looks for all: another node may see the shared directory late.
    if comm.broadcast_object(_read_manifest(final) is not None if comm.rank == 0 else None):
        return None
    partial = root / f"{_PARTIAL}step-{state.step:08d}"
    if comm.rank == 0:
        remove_partial(run_dir)
        partial.mkdir(parents=True)
    comm.barrier()
    student.save(partial, _TAG, state.to_json())
    comm.barrier()
    if comm.rank == 0:
        files = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        manifest = Manifest(FORMAT, state.step, comm.world_size, ledger_bytes, files)
        write_text(partial / _MANIFEST, json.dumps(asdict(manifest), indent=1))
        if final.exists():
            final.rename(final.with_name(f"{_BROKEN}{final.name}-{time.time_ns()}"))
        partial.rename(final)
    comm.barrier()
    return final


def remove_partial(run_dir: Path) -> None:
    """Delete what writers that were killed left behind; complete checkpoints are not touched."""
    for partial in (run_dir / "checkpoints").glob(_PARTIAL + "*"):
        shutil.rmtree(partial)


def newest_checkpoint(run_dir: Path) -> tuple[Path, Manifest] | None:
    """The complete checkpoint with the highest step, or None."""
    for directory in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
        manifest = _read_manifest(directory)
        if manifest is not None:
            return directory, manifest
    return None


def load_checkpoint(student: Student, directory: Path, manifest: Manifest, comm: Comm) -> RunState:
    """Restore weights and optimizer in place, return the run's state. Collective.

    Raises CheckpointError if the checkpoint is of another number of ranks.
    """
    if manifest.world_size != comm.world_size:
        raise CheckpointError(
            f"{directory} was written by {manifest.world_size} ranks, this run has {comm.world_size}: start it on "
            f"{manifest.world_size}, or use another name for a new run"
        )
    return RunState.from_json(student.load(directory, _TAG))


def _read_manifest(directory: Path) -> Manifest | None:
    try:
        values: dict[str, Any] = json.loads((directory / _MANIFEST).read_text())
        manifest = Manifest(**values)
        whole = all((directory / file).stat().st_size == size for file, size in manifest.files.items())
    except (OSError, ValueError, TypeError):
        return None
    return manifest if whole and manifest.format == FORMAT else None
