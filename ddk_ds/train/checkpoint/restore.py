"""Where a run goes on from: its own newest checkpoint, that of the run it forks, or the beginning.

Found, verified and, for another number of ranks, converted before any model is loaded.

Back to the last checkpoint, past the samples on which the numbers went wrong (as in PaLM, arXiv 2204.02311, 5.1).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ddk_ds.comm import Comm
from ddk_ds.config import Config
from ddk_ds.engine.student import Student
from ddk_ds.engine.zero_shards import write_universal
from ddk_ds.errors import CheckpointError
from ddk_ds.files import partial_path, size_and_xxh64, write_text
from ddk_ds.train.checkpoint.checkpoint_files import (
    MANIFEST,
    TAG,
    Manifest,
    complete_ones,
    is_whole,
    read_manifest,
    remove_partial,
    usable_checkpoint,
)
from ddk_ds.train.checkpoint.saver import SaveFailed, agree_on_failure, finish_directory, make_room
from ddk_ds.train.run import Run
from ddk_ds.train.state import RunState
from ddk_ds.version import versions

ROLL_BACKS = "roll_backs.json"
# What a fork must have in common with its source: what the checkpoint's tensors and place in the data are made of.
_COMMON = (
    "seed",
    "data.sequence_length",
    "train.global_batch_samples",
    "train.precision",
    "content.student",
    "content.tokenizer",
    "content.domains.",
)


@dataclass(frozen=True)
class Start:
    """A verified checkpoint to go on from."""

    directory: Path
    manifest: Manifest
    forked: bool = False
    """Of another run, by `init_from`."""
    universal: Path | None = None
    """The same for any number of ranks, where it was written on another."""
    damaged: list[Path] = field(default_factory=list)
    """Newer ones that are not what their hashes say."""

    @property
    def changed_versions(self) -> dict[str, str]:
        """Packages that differ from those that wrote it: name -> "old -> new"."""
        old, new = self.manifest.versions, versions()
        return {name: f"{old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]}

    def load(self, student: Student) -> RunState:
        """Restore weights and optimizer in place, return the run's state. Collective."""
        place = self.directory if self.universal is None else self.universal
        return RunState.from_json(student.load(place, TAG, universal=self.universal is not None))


def find_start(config: Config, comm: Comm) -> Start | None:
    """What the run goes on from; None: the beginning. Collective.

    Raises CheckpointError where what there is cannot be used.
    """
    if comm.rank == 0:
        remove_partial(config.run_dir)
    found = usable_checkpoint(config.run_dir, comm)
    if found is not None:
        directory, manifest, damaged = found
        start = Start(directory, manifest, damaged=damaged)
    elif config.init_from is not None:
        directory, manifest = source_checkpoint(config.init_from)
        if not is_whole(directory, manifest, comm):
            raise CheckpointError(f"init_from: {directory} is damaged, its files are not what their hashes say")
        start = Start(directory, manifest, forked=True)
    else:
        return None
    if start.manifest.world_size == comm.world_size:
        return start
    return replace(start, universal=_universal(config, start, comm))


def read_roll_backs(run_dir: Path, comm: Comm) -> list[dict[str, Any]]:
    """The run's roll-backs so far (see roll_back.py). Collective."""
    path = run_dir / ROLL_BACKS
    done: list[dict[str, Any]] = comm.broadcast_object(
        json.loads(path.read_text()) if comm.rank == 0 and path.is_file() else []
    )
    return done


def source_checkpoint(init_from: str) -> tuple[Path, Manifest]:
    """The checkpoint that `init_from` names: itself, or the newest complete one of a run's directory.

    Raises CheckpointError where there is none.
    """
    path = Path(init_from)
    manifest = read_manifest(path)
    if manifest is not None:
        return path, manifest
    newest = next(complete_ones(path / "checkpoints"), None)
    if newest is None:
        raise CheckpointError(
            f"init_from: {path} is neither a complete checkpoint (<run>/checkpoints/step-...) nor the directory of a "
            "run that has one"
        )
    return newest


def check_fork(init_from: str, identity: dict[str, Any]) -> str:
    """Hash of the checkpoint that `init_from` names, which must fit a run of that identity.

    Raises CheckpointError naming what differs.
    """
    directory, manifest = source_checkpoint(init_from)
    keys = [key for key in {**manifest.run, **identity} if key.startswith(_COMMON)]
    differing = [key for key in sorted(keys) if manifest.run.get(key) != identity.get(key)]
    if differing:
        shown = "; ".join(f"{key} was {manifest.run.get(key)!r}, is {identity.get(key)!r}" for key in differing[:4])
        raise CheckpointError(
            f"init_from: {directory} cannot go on under this configuration: {shown}. A fork keeps the start model, the "
            "tokenizer, domains and shards, the seed, sequence length, global batch and precision; all else may change"
        )
    return size_and_xxh64(directory / MANIFEST)[1]


def _universal(config: Config, start: Start, comm: Comm) -> Path:
    """The checkpoint in DeepSpeed's universal form, made once, by all ranks, in this run's directory. Collective."""
    if config.optimizer.offload == "nvme":
        raise CheckpointError(
            f"{start.directory} was written by {start.manifest.world_size} ranks, this run has {comm.world_size}, and "
            f"optimizer.offload is nvme, whose states stay on each node: start it on {start.manifest.world_size} ranks"
        )
    root = config.run_dir / "checkpoints"
    final = root / f"universal-{start.manifest.step:08d}"
    source = size_and_xxh64(start.directory / MANIFEST)[1]
    there = comm.broadcast_object(read_manifest(final) if comm.rank == 0 else None)
    if there is not None and there.source == source and is_whole(final, there, comm):
        return final
    partial = partial_path(final)
    manifest = replace(start.manifest, files={}, source=source)
    try:
        agree_on_failure(comm, make_room(config.run_dir, partial) if comm.rank == 0 else "")
        written = write_universal(
            start.directory / TAG,
            partial / TAG,
            source_ranks=start.manifest.world_size,
            rank=comm.rank,
            world_size=comm.world_size,
        )
        finish_directory(comm, partial, final, manifest, lambda: written)
    except SaveFailed as failure:
        raise CheckpointError(f"{start.directory} cannot be converted for {comm.world_size} ranks: {failure}") from None
    return final


def go_on_from(run: Run, start: Start) -> None:
    """Restore weights, optimizer, state and ledger from a checkpoint. Collective."""
    fresh = run.state
    run.state = start.load(run.student)
    run.state.data.check_fits(fresh.data)
    if start.forked and run.config.loss.chunk_tokens is not None:
        run.state.chunk_tokens = fresh.chunk_tokens
    run.head_options = replace(run.head_options, chunk_tokens=run.state.chunk_tokens)
    run.ledger.rewind(0 if start.forked else start.manifest.ledger_bytes)
    passed = read_roll_backs(run.config.run_dir, run.runtime.comm)
    positions = [entry["skip_until"] for entry in passed if entry["step"] == run.state.step]
    run.state.skip_until = max([run.state.skip_until, *positions])


def roll_back(run: Run, reason: str) -> bool:
    """Restore the last checkpoint and leave out all samples since then, if the configuration allows one more.

    What was done is kept in roll_backs.json, so that a run that is killed before its next checkpoint does the same.
    Returns whether it was done. Collective.
    """
    config, comm = run.config, run.runtime.comm
    done = read_roll_backs(config.run_dir, comm)
    if len(done) >= config.guard.roll_backs:
        return False
    failed, skip_until = run.state.step, run.state.position
    run.watchdog.watch("checkpoint", failed)
    start = find_start(config, comm)
    if start is None:
        return False
    if comm.rank == 0:
        entry = {"step": start.manifest.step, "failed_step": failed, "skip_until": skip_until, "reason": reason}
        write_text(config.run_dir / ROLL_BACKS, json.dumps([*done, entry], indent=1))
    comm.barrier()
    go_on_from(run, start)
    run.ledger.event("roll_back", step=run.state.step, failed_step=failed, skip_until=skip_until, reason=reason)
    run.progress.say(
        f"warning: {reason}. Rolled back to step {run.state.step}; the {skip_until - run.state.position:,} samples "
        "since then are left out"
    )
    return True
