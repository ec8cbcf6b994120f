"""Checkpoints on the disk: which directory counts as one, which is the newest, which are deleted.

    <run>/checkpoints/step-00000500/manifest.json    every file with its size and hash; written last
    <run>/checkpoints/step-00000500/state/           DeepSpeed's shards; the run's own state is their client state

A directory without a valid manifest is never loaded and never counted. It is in place only when everything that it
needs is on the disk, so that a power cut leaves no checkpoint that cannot be resumed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from pydantic import TypeAdapter

from ddk_ds.config import Checkpoint
from ddk_ds.errors import UserError
from ddk_ds.files import PARTIAL, partial_path, read_object, size_and_xxh64, sync, sync_directories, write_text

FORMAT = 5
"""Number of the layout of a run's directory and its checkpoints; a directory of another format is refused."""
MANIFEST = "manifest.json"
TAG = "state"
LEDGER = "ledger.jsonl"
_OWN_HASH = "xxh64"
"""Key of manifest.json with the hash of all else in it."""
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
    ledger_xxh64: str = ""
    """xxh64 of these bytes of ledger.jsonl; "" if it was not noted."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(size for size, _ in self.files.values())


_MANIFEST = TypeAdapter(Manifest)


def put_in_place(partial: Path, final: Path, manifest: Manifest) -> str:
    """Write the manifest into `partial` and rename it to `final`; return why that is not possible, or "".

    The files of the manifest must be on the disk. The ledger, the other files and all directories are before the
    rename, which makes the checkpoint count. An incomplete directory in the place of `final` is kept under another
    name.
    """
    run_dir = final.parent.parent
    try:
        if (run_dir / LEDGER).is_file():
            sync(run_dir / LEDGER)
        for path in sorted(partial.rglob("*")):  # DeepSpeed copies a script that joins the shards next to them
            if path.is_file() and str(path.relative_to(partial)) not in manifest.files:
                sync(path)
                manifest.files[str(path.relative_to(partial))] = size_and_xxh64(path)
        sync_directories(partial)
        content = asdict(manifest)
        write_text(partial / MANIFEST, json.dumps({**content, _OWN_HASH: _own_hash(content)}, indent=1))
        if read_manifest(partial) is None:
            return f"files of {partial} were deleted while it was written"
        if final.exists():
            set_aside(final, str(time.time_ns()))
        partial.rename(final)
        sync(final.parent)
        sync(run_dir)
    except OSError as error:
        return str(error)
    return ""


def _own_hash(content: dict[str, Any]) -> str:
    return xxhash.xxh64_hexdigest(json.dumps(content))


def set_aside(directory: Path, ending: str) -> Path:
    """Rename a checkpoint, so that it is never loaded and never deleted, and return its new path. Raises OSError."""
    return directory.rename(directory.with_name(f"{_BROKEN}{directory.name}-{ending}"))


def delete_old(root: Path, keep: Checkpoint) -> None:
    """Delete complete checkpoints that `keep` does not ask for."""
    for directory, manifest in list(complete_checkpoints(root))[keep.keep_last :]:
        if keep.keep_every_steps is None or manifest.step % keep.keep_every_steps:
            _delete(directory)


def _delete(directory: Path) -> None:
    # Renamed first: a kill in between must not leave half a checkpoint under the name of one.
    renamed = partial_path(directory.with_name(f"old-{directory.name}"))
    with contextlib.suppress(FileNotFoundError):  # somebody deleted it
        directory.rename(renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def remove_partial(run_dir: Path) -> None:
    """Delete what killed writers left behind; complete checkpoints are not touched."""
    for partial in (run_dir / "checkpoints").glob(PARTIAL + "*"):
        shutil.rmtree(partial, ignore_errors=True)


def newest_checkpoint(run_dir: Path) -> tuple[Path, Manifest] | None:
    """Return the complete checkpoint with the highest step, or None."""
    return next(complete_checkpoints(run_dir / "checkpoints"), None)


def damaged_since(run_dir: Path, step: int) -> list[str]:
    """Return the names of the checkpoints after `step` that are not complete, so that an older one is used for them."""
    named = {directory.name: directory for directory in (run_dir / "checkpoints").glob("step-*")}
    return sorted(name for name, at in named.items() if name > f"step-{step:08d}" and read_manifest(at) is None)


def complete_checkpoints(root: Path) -> Iterator[tuple[Path, Manifest]]:
    """Yield every complete checkpoint below `root` with its manifest, the newest first."""
    for directory in sorted(root.glob("step-*"), reverse=True):
        manifest = read_manifest(directory)
        if manifest is not None:
            yield directory, manifest


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of a checkpoint; None unless it is complete: every file exists and has its size.

    A manifest that is not as it was written is none.
    """
    try:
        content = read_object(directory / MANIFEST, "")
        if content.pop(_OWN_HASH, None) not in (None, _own_hash(content)):
            return None
        manifest = _MANIFEST.validate_json(json.dumps(content), strict=True)
        complete = manifest.format == FORMAT and all(
            (directory / file).stat().st_size == size for file, (size, _) in manifest.files.items()
        )
    except (OSError, ValueError):  # which a UserError is
        return None
    return manifest if complete else None


def other_format(directory: Path) -> int | None:
    """Return the format number of a checkpoint that another version of ddk_ds wrote.

    Return None if it has this version's format, or if the directory has no readable manifest.
    """
    try:
        found = read_object(directory / MANIFEST, "").get("format")
    except UserError:
        return None
    return found if isinstance(found, int) and found != FORMAT else None
