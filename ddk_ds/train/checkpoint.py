"""Sharded checkpoints: written under a temporary name, completed by a manifest, renamed into place.

    <run>/checkpoints/step-00000500/manifest.json    step, world size, ledger position, every file with size and hash
    <run>/checkpoints/step-00000500/state/           DeepSpeed's shards; the run's own state is their client state

A directory without a valid manifest is never loaded. A write that fails leaves the run and the older ones as they were.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddk_ds.comm import Comm
from ddk_ds.config import Checkpoint
from ddk_ds.engine.models import Student
from ddk_ds.errors import CheckpointError
from ddk_ds.files import size_and_xxh64, write_text
from ddk_ds.train.state import RunState

FORMAT = 2
_MANIFEST = "manifest.json"
_TAG = "state"
_PARTIAL = ".partial-"
_BROKEN = "broken-"
# Of the size of the last checkpoint: free space that the next one must find.
_HEADROOM = 1.05


@dataclass(frozen=True)
class Manifest:
    """What completes a checkpoint."""

    format: int
    step: int
    world_size: int
    ledger_bytes: int
    files: dict[str, tuple[int, str]]
    """Path below the checkpoint -> bytes, xxh64."""


class SaveFailed(Exception):
    """A checkpoint could not be written; on every rank, with one reason. The run can go on."""


def save_checkpoint(
    student: Student, state: RunState, run_dir: Path, ledger_bytes: int, comm: Comm, keep: Checkpoint
) -> Path | None:
    """Write a checkpoint of this step, then delete those that `keep` does not ask for. Collective.

    Returns its directory, or None if it is there already and complete; an incomplete one in its place is kept under
    another name. Raises SaveFailed where it cannot be written.
    """
    root = run_dir / "checkpoints"
    final = root / f"step-{state.step:08d}"
    # Rank 0 looks for all: another node may see the shared directory late.
    if comm.broadcast_object(_read_manifest(final) is not None if comm.rank == 0 else None):
        return None
    partial = root / f"{_PARTIAL}step-{state.step:08d}"
    _agree(comm, _begin(run_dir, partial) if comm.rank == 0 else "")
    written, failure = student.save(partial, _TAG, state.to_json())
    found = comm.gather_objects(({str(path.relative_to(partial)): entry for path, entry in written.items()}, failure))
    failure = next((failure for _, failure in found if failure), "")
    if comm.rank == 0 and not failure:
        files = {name: entry for files, _ in found for name, entry in files.items()}
        failure = _complete(partial, final, Manifest(FORMAT, state.step, comm.world_size, ledger_bytes, files))
    if comm.rank == 0 and failure:
        shutil.rmtree(partial, ignore_errors=True)
    _agree(comm, failure)
    if comm.rank == 0:
        _delete_old(root, keep)
    return final


def _agree(comm: Comm, failure: str) -> None:
    """Raise SaveFailed on every rank with rank 0's reason, if there is one. Collective."""
    if reason := comm.broadcast_object(failure):
        raise SaveFailed(reason)


def _begin(run_dir: Path, partial: Path) -> str:
    """Make the directory; why that is not possible, or ""."""
    newest = next(_complete_ones(run_dir / "checkpoints"), None)
    needed = 0 if newest is None else int(_HEADROOM * sum(size for size, _ in newest[1].files.values()))
    try:
        remove_partial(run_dir)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
    except OSError as error:
        return str(error)
    return f"{partial.parent} has {free:,} bytes free, a checkpoint takes {needed:,}" if free < needed else ""


def _complete(partial: Path, final: Path, manifest: Manifest) -> str:
    """Write the manifest and rename; why that is not possible, or ""."""
    try:
        for path in sorted(partial.rglob("*")):  # DeepSpeed copies a script that joins the shards beside them
            if path.is_file() and str(path.relative_to(partial)) not in manifest.files:
                manifest.files[str(path.relative_to(partial))] = size_and_xxh64(path)
        write_text(partial / _MANIFEST, json.dumps(asdict(manifest), indent=1))
        if final.exists():
            final.rename(final.with_name(f"{_BROKEN}{final.name}-{time.time_ns()}"))
        partial.rename(final)
    except OSError as error:
        return str(error)
    return ""


def _delete_old(root: Path, keep: Checkpoint) -> None:
    for directory, manifest in list(_complete_ones(root))[keep.keep_last :]:
        if keep.keep_every_steps is None or manifest.step % keep.keep_every_steps:
            # Under a name that is no checkpoint's first: a kill must not leave half of one.
            gone = directory.with_name(f"{_PARTIAL}old-{directory.name}")
            directory.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def remove_partial(run_dir: Path) -> None:
    """Delete what writers that were killed left behind; complete checkpoints are not touched."""
    for partial in (run_dir / "checkpoints").glob(_PARTIAL + "*"):
        shutil.rmtree(partial)


def newest_checkpoint(run_dir: Path) -> tuple[Path, Manifest] | None:
    """The complete checkpoint with the highest step, or None."""
    return next(_complete_ones(run_dir / "checkpoints"), None)


def _complete_ones(root: Path) -> Iterator[tuple[Path, Manifest]]:
    """Every complete checkpoint, the newest first."""
    for directory in sorted(root.glob("step-*"), reverse=True):
        manifest = _read_manifest(directory)
        if manifest is not None:
            yield directory, manifest


def usable_checkpoint(run_dir: Path, comm: Comm) -> tuple[Path, Manifest, list[Path]] | None:
    """The newest checkpoint whose files are what their hashes say, and the damaged ones that were newer. Collective.

    A damaged one is renamed, so that it is never loaded and never deleted; each rank hashes its share of the files.

    Raises CheckpointError where there are checkpoints and all are damaged.
    """
    damaged: list[Path] = []
    while True:
        found = comm.broadcast_object(newest_checkpoint(run_dir) if comm.rank == 0 else None)
        if found is None and damaged:
            raise CheckpointError(
                f"every checkpoint of {run_dir} is damaged: {', '.join(map(str, damaged))}; put one back from a copy, "
                "or start a new run under another name"
            )
        if found is None:
            return None
        directory, manifest = found
        share = sorted(manifest.files)[comm.rank :: comm.world_size]
        whole = all(size_and_xxh64(directory / name) == tuple(manifest.files[name]) for name in share)
        if all(comm.gather_objects(whole)):
            return directory, manifest, damaged
        damaged.append(directory.with_name(f"{_BROKEN}{directory.name}-{manifest.ledger_bytes}"))
        if comm.rank == 0:
            directory.rename(damaged[-1])
        comm.barrier()


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
        whole = manifest.format == FORMAT and all(
            (directory / file).stat().st_size == size for file, (size, _) in manifest.files.items()
        )
    except (OSError, ValueError, TypeError):
        return None
    return manifest if whole else None
