"""Which of a run's checkpoints it continues from: the newest that is intact and that the ledger reaches.

Each checkpoint notes the length and the hash of the ledger at its step. A ledger that a power cut, or a copy, left
short costs the checkpoints that it does not reach; one that is damaged before lines that can be read is an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ddk_ds.comm import Comm, call_together
from ddk_ds.errors import CheckpointError
from ddk_ds.files import size_and_xxh64
from ddk_ds.train.checkpoint.checkpoint_files import LEDGER, Manifest, complete_checkpoints, damaged_since, set_aside


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that the run does not continue from."""

    path: Path
    reason: str
    """Why not, as a phrase that follows its path."""


def usable_checkpoint(
    run_dir: Path, comm: Comm, at_most: int | None = None
) -> tuple[Path, Manifest, list[PassedOver]] | None:
    """Return the newest checkpoint that can be used, and the newer ones that were passed over; None without any.

    Those that were passed over are renamed, so that they are never loaded and never deleted; one that is not complete
    stays until another is written in its place. Collective.

    Args:
        at_most: step of the newest checkpoint that may be used; None: any.

    Raises:
        CheckpointError: there are checkpoints and none can be used, or the ledger is damaged before lines that can be
            read. Nothing is renamed.
    """
    complete = complete_checkpoints(run_dir / "checkpoints") if comm.rank == 0 else iter(())
    candidates = (found for found in complete if at_most is None or found[1].step <= at_most)
    passed: list[tuple[Path, Manifest, str]] = []
    while (found := comm.broadcast_object(next(candidates, None))) is not None:
        directory, manifest = found
        reason = _fault(run_dir, directory, manifest, comm)
        if not reason:
            incomplete = _incomplete(run_dir, manifest.step, comm) if at_most is None else []
            return directory, manifest, incomplete + _rename(passed, comm)
        passed.append((directory, manifest, reason))
    incomplete = _incomplete(run_dir, -1, comm) if at_most is None else []
    if passed or incomplete:
        faults = [f"{directory} {reason}" for directory, _, reason in passed]
        shown = "; ".join(faults + [f"{one.path} {one.reason}" for one in incomplete])
        raise CheckpointError(
            f"every checkpoint of {run_dir} is damaged, or the ledger does not reach it: {shown}; put back what is "
            "missing from a copy, go on from an intact checkpoint under another name (init_from), or begin a new run"
        )
    return None


def _incomplete(run_dir: Path, step: int, comm: Comm) -> list[PassedOver]:
    reason = "is damaged or of another version: its manifest or a file's size is not as it was written"
    names: list[str] = comm.broadcast_object(damaged_since(run_dir, step) if comm.rank == 0 else None)
    return [PassedOver(run_dir / "checkpoints" / name, reason) for name in names]


def leave_out_after(run_dir: Path, step: int, comm: Comm) -> None:
    """Rename the checkpoints of later steps than `step`, to which the run goes back. Collective."""
    complete = list(complete_checkpoints(run_dir / "checkpoints")) if comm.rank == 0 else []
    _rename([(directory, manifest, "") for directory, manifest in complete if manifest.step > step], comm)


def _rename(passed: list[tuple[Path, Manifest, str]], comm: Comm) -> list[PassedOver]:
    def renamed() -> list[PassedOver]:
        try:
            return [
                PassedOver(set_aside(directory, str(manifest.ledger_bytes)), reason)
                for directory, manifest, reason in passed
            ]
        except OSError as error:
            raise CheckpointError(f"a checkpoint that cannot be used cannot be renamed: {error}") from error

    moved: list[PassedOver] = comm.broadcast_object(call_together(comm, renamed if comm.rank == 0 else list))
    return moved


def _fault(run_dir: Path, directory: Path, manifest: Manifest, comm: Comm) -> str:
    """Return why a checkpoint cannot be used, or "". Collective."""
    on_rank_0 = comm.rank == 0
    short = call_together(comm, lambda: ledger_fault(run_dir / LEDGER, directory, manifest) if on_rank_0 else "")
    reason: str = comm.broadcast_object(short)
    if not reason and not is_intact(directory, manifest, comm):
        reason = "is damaged, its files are not what their hashes say"
    return reason


def is_intact(directory: Path, manifest: Manifest, comm: Comm) -> bool:
    """Return True on all ranks if every file has its hash of the manifest. Each rank hashes a share. Collective."""
    share = sorted(manifest.files)[comm.rank :: comm.world_size]
    try:
        intact = all(size_and_xxh64(directory / name) == manifest.files[name] for name in share)
    except OSError:
        intact = False
    return all(comm.gather_objects(intact))


def ledger_fault(path: Path, directory: Path, manifest: Manifest) -> str:
    """Return why the ledger at `path` does not reach the checkpoint in `directory`, or "" if it does.

    Raises CheckpointError if it does, but is not what the run wrote up to there.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(manifest.ledger_bytes)
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if manifest.ledger_xxh64 and xxhash.xxh64_hexdigest(content) == manifest.ledger_xxh64:
        return ""
    if len(content) < manifest.ledger_bytes:
        return f"was saved at {manifest.ledger_bytes:,} bytes of {path.name}, which has {len(content):,}"
    lines = content.split(b"\n")
    good = [_is_record(line) for line in lines[:-1]] + [False] * bool(lines[-1])
    if all(good) and not manifest.ledger_xxh64:
        return ""
    bad = good.index(False) if False in good else None
    if bad is not None and not any(good[bad:]):
        return f"needs line {bad + 1:,} of {path.name}, which is damaged"
    where = f"{path}: a value in it was changed" if bad is None else f"{path}, line {bad + 1:,}: damaged"
    raise CheckpointError(
        f"{where} since the run wrote it; put the file back from a copy, or go on from the checkpoint under another "
        f"name, with a new ledger: init_from={directory}"
    )


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
