"""Checkpoints on the disk: what counts as one, which is the newest, which are deleted.

    <run>/checkpoints/step-00000500/manifest.json    what completes it: every file with size and hash
    <run>/checkpoints/step-00000500/state/           DeepSpeed's shards; the run's own state is their client state
    <run>/checkpoints/universal-00000500/            the same for any number of ranks, where one was needed

A directory without a valid manifest is never loaded and never counted.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddk_ds.config import Checkpoint
from ddk_ds.errors import CheckpointError
from ddk_ds.files import PARTIAL, partial_path, size_and_xxh64, write_text

if TYPE_CHECKING:  # it brings torch, which tools/status.py need not wait for
    from ddk_ds.comm import Comm

FORMAT = 3
MANIFEST = "manifest.json"
TAG = "state"
_BROKEN = "broken-"

Files = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Manifest:
    """What completes a checkpoint."""

    format: int
    step: int
    world_size: int
    """Ranks that wrote it, each its own shards."""
    ledger_bytes: int
    """Length of ledger.jsonl at this step."""
    run: dict[str, Any]
    """The run's identity: configuration and fingerprints of models and data, flat (see run_dir.py)."""
    versions: dict[str, str]
    """Of Python and the packages that the numbers depend on."""
    files: Files
    """Path below the checkpoint -> bytes, xxh64."""
    source: str = ""
    """Of a universal one: xxh64 of the manifest that it was made from."""

    @property
    def num_bytes(self) -> int:
        """Size on the disk."""
        return sum(size for size, _ in self.files.values())


def complete(partial: Path, final: Path, manifest: Manifest) -> str:
    """Write the manifest and rename; why that is not possible, or "". Something incomplete in its place is kept."""
    try:
        for path in sorted(partial.rglob("*")):  # DeepSpeed copies a script that joins the shards beside them
            if path.is_file() and str(path.relative_to(partial)) not in manifest.files:
                manifest.files[str(path.relative_to(partial))] = size_and_xxh64(path)
        write_text(partial / MANIFEST, json.dumps(asdict(manifest), indent=1))
        if final.exists():
            final.rename(final.with_name(f"{_BROKEN}{final.name}-{time.time_ns()}"))
        partial.rename(final)
    except OSError as error:
        return str(error)
    return ""


def delete_old(root: Path, keep: Checkpoint) -> None:
    """Delete the complete checkpoints that `keep` does not ask for, and universal ones older than the newest."""
    ones = list(complete_ones(root))
    for directory, manifest in ones[keep.keep_last :]:
        if keep.keep_every_steps is None or manifest.step % keep.keep_every_steps:
            _delete(directory)
    for directory in root.glob("universal-*"):
        if ones and directory.name < f"universal-{ones[0][1].step:08d}":
            _delete(directory)


def _delete(directory: Path) -> None:
    # Under a name that is no checkpoint's first: a kill must not leave half of one.
    gone = partial_path(directory.with_name(f"old-{directory.name}"))
    directory.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_partial(run_dir: Path) -> None:
    """Delete what writers that were killed left behind; complete checkpoints are not touched."""
    for partial in (run_dir / "checkpoints").glob(PARTIAL + "*"):
        shutil.rmtree(partial)


def newest_checkpoint(run_dir: Path) -> tuple[Path, Manifest] | None:
    """The complete checkpoint with the highest step, or None."""
    return next(complete_ones(run_dir / "checkpoints"), None)


def complete_ones(root: Path) -> Iterator[tuple[Path, Manifest]]:
    """Every complete checkpoint, the newest first."""
    for directory in sorted(root.glob("step-*"), reverse=True):
        manifest = read_manifest(directory)
        if manifest is not None:
            yield directory, manifest


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a complete checkpoint: every file is there and of its size. None: it is not complete."""
    try:
        manifest = Manifest(**json.loads((directory / MANIFEST).read_text()))
        whole = manifest.format == FORMAT and all(
            (directory / file).stat().st_size == size for file, (size, _) in manifest.files.items()
        )
    except (OSError, ValueError, TypeError):
        return None
    return manifest if whole else None


def is_whole(directory: Path, manifest: Manifest, comm: Comm) -> bool:
    """Whether every file is what its hash says; each rank hashes its share. Collective."""
    share = sorted(manifest.files)[comm.rank :: comm.world_size]
    try:
        whole = all(size_and_xxh64(directory / name) == tuple(manifest.files[name]) for name in share)
    except OSError:
        whole = False
    return all(comm.gather_objects(whole))


def usable_checkpoint(run_dir: Path, comm: Comm) -> tuple[Path, Manifest, list[Path]] | None:
    """The newest checkpoint whose files are what their hashes say, and the damaged ones that were newer. Collective.

    A damaged one is renamed, so that it is never loaded and never deleted.

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
        if is_whole(directory, manifest, comm):
            return directory, manifest, damaged
        damaged.append(directory.with_name(f"{_BROKEN}{directory.name}-{manifest.ledger_bytes}"))
        if comm.rank == 0:
            directory.rename(damaged[-1])
        comm.barrier()
