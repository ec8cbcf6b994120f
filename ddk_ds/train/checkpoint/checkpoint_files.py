"""Checkpoints on the disk: which directory counts as one, which is the newest, which are deleted.

    <run>/checkpoints/step-00000500/manifest.json    every file with its size and hash; written last
    <run>/checkpoints/step-00000500/state/           DeepSpeed's shards; the run's own state is their client state
    <run>/checkpoints/universal-00000500/            the same for any number of ranks, made when a run needs it

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

if TYPE_CHECKING:  # it imports torch, which `ddk status` need not wait for
    from ddk_ds.comm import Comm

FORMAT = 4
"""Number of the layout of a run's directory and its checkpoints; a directory of another format is refused."""
MANIFEST = "manifest.json"
TAG = "state"
_BROKEN = "broken-"

Files = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json, without which a checkpoint is not complete."""

    format: int
    step: int
    world_size: int
    """Number of ranks that wrote the checkpoint, each its own shards."""
    ledger_bytes: int
    """Length of ledger.jsonl at this step."""
    run: dict[str, Any]
    """Identity of the run: configuration and fingerprints of models and data, flat (see run_dir.py)."""
    versions: dict[str, str]
    """Versions of Python and of the packages that the numbers depend on."""
    files: Files
    """Path below the checkpoint -> (bytes, xxh64)."""
    source: str = ""
    """xxh64 of the manifest that a universal checkpoint was made from; "" in any other."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(size for size, _ in self.files.values())


def put_in_place(partial: Path, final: Path, manifest: Manifest) -> str:
    """Write the manifest into `partial` and rename it to `final`; return why that is not possible, or "".

    An incomplete directory in the place of `final` is kept under another name.
    """
    try:
        for path in sorted(partial.rglob("*")):  # DeepSpeed copies a script that joins the shards next to them
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
    """Delete complete checkpoints that `keep` does not ask for, and universal ones older than the newest checkpoint."""
    complete = list(complete_checkpoints(root))
    for directory, manifest in complete[keep.keep_last :]:
        if keep.keep_every_steps is None or manifest.step % keep.keep_every_steps:
            _delete(directory)
    for directory in root.glob("universal-*"):
        if complete and directory.name < f"universal-{complete[0][1].step:08d}":
            _delete(directory)


def _delete(directory: Path) -> None:
    # Renamed first: a kill in between must not leave half a checkpoint under the name of one.
    renamed = partial_path(directory.with_name(f"old-{directory.name}"))
    directory.rename(renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def remove_partial(run_dir: Path) -> None:
    """Delete what killed writers left behind; complete checkpoints are not touched."""
    for partial in (run_dir / "checkpoints").glob(PARTIAL + "*"):
        shutil.rmtree(partial)


def newest_checkpoint(run_dir: Path) -> tuple[Path, Manifest] | None:
    """Return the complete checkpoint with the highest step, or None."""
    return next(complete_checkpoints(run_dir / "checkpoints"), None)


def complete_checkpoints(root: Path) -> Iterator[tuple[Path, Manifest]]:
    """Yield every complete checkpoint below `root` with its manifest, the newest first."""
    for directory in sorted(root.glob("step-*"), reverse=True):
        manifest = read_manifest(directory)
        if manifest is not None:
            yield directory, manifest


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of a checkpoint; None unless it is complete: every file exists and has its size."""
    try:
        manifest = Manifest(**json.loads((directory / MANIFEST).read_text()))
        complete = manifest.format == FORMAT and all(
            (directory / file).stat().st_size == size for file, (size, _) in manifest.files.items()
        )
    except (OSError, ValueError, TypeError):
        return None
    return manifest if complete else None


def other_format(directory: Path) -> int | None:
    """Return the format number of a checkpoint that another version of ddk_ds wrote.

    Return None if it has this version's format, or if the directory has no readable manifest.
    """
    try:
        found = json.loads((directory / MANIFEST).read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if found == FORMAT else int(found)


def is_intact(directory: Path, manifest: Manifest, comm: Comm) -> bool:
    """Return True on all ranks if every file has its hash of the manifest. Each rank hashes a share. Collective."""
    share = sorted(manifest.files)[comm.rank :: comm.world_size]
    try:
        intact = all(size_and_xxh64(directory / name) == tuple(manifest.files[name]) for name in share)
    except OSError:
        intact = False
    return all(comm.gather_objects(intact))


def usable_checkpoint(run_dir: Path, comm: Comm) -> tuple[Path, Manifest, list[Path]] | None:
    """Return the newest checkpoint whose files have their hashes, and the newer, damaged ones. Collective.

    A damaged checkpoint is renamed, so that it is never loaded and never deleted.

    Raises CheckpointError if there are checkpoints and all of them are damaged.
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
        if is_intact(directory, manifest, comm):
            return directory, manifest, damaged
        damaged.append(directory.with_name(f"{_BROKEN}{directory.name}-{manifest.ledger_bytes}"))
        if comm.rank == 0:
            directory.rename(damaged[-1])
        comm.barrier()
