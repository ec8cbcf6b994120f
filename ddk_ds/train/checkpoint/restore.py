"""The checkpoint that a run continues from: its own newest one, that of the run it forks, or none.

It is found and verified before any model is loaded. A roll-back restores it during the run, and leaves out the samples
on which the numbers went wrong (as in PaLM, arXiv 2204.02311, 5.1).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ddk_ds.comm import Comm, call_together
from ddk_ds.config import Config
from ddk_ds.config.keys import changed_keys
from ddk_ds.engine.student import Student
from ddk_ds.errors import CheckpointError
from ddk_ds.files import read_json, size_and_xxh64, write_text
from ddk_ds.train.checkpoint.checkpoint_files import (
    FORMAT,
    MANIFEST,
    TAG,
    Manifest,
    complete_checkpoints,
    other_format,
    read_manifest,
    remove_partial,
)
from ddk_ds.train.checkpoint.usable_checkpoint import PassedOver, is_intact, leave_out_after, usable_checkpoint
from ddk_ds.train.run import Run
from ddk_ds.train.state import RunState
from ddk_ds.version import versions

ROLL_BACKS = "roll_backs.json"
# Options and fingerprints that a run shares with the one it begins from. They shape a checkpoint's tensors, and for a
# fork its data order too. A phase may have another config.json, such as one with more positions.
_COMMON = {
    "phase": ("train.precision", "content.tokenizer"),
    "fork": (
        "seed",
        "data.sequence_length",
        "train.global_batch_samples",
        "train.precision",
        "content.student",
        "content.tokenizer",
        "content.domains.",
    ),
}
# What a fork also shares if its controller continues from more than proportions and smoothed perplexities.
_WITH_MEMORY = ("ado", "odm")
_KEEPS = {
    "phase": "A phase keeps tokenizer and precision, and the student's parameters; all else can change",
    "fork": "A fork keeps the start model, the tokenizer, domains and shards, seed, sequence length, global batch and "
    "precision, and what its controller continues from (ado and odm, their mixture.exclude, mixture.source: training); "
    "all else can change, and with init_as: phase those of the data and the controller too",
}


@dataclass(frozen=True)
class Start:
    """A verified checkpoint to continue from."""

    directory: Path
    manifest: Manifest
    kind: Literal["resume", "fork", "phase"] = "resume"
    """resume: it is the run's own checkpoint. Else another run's, named by `init_from` (see `init_as`)."""
    passed: list[PassedOver] = field(default_factory=list)
    """Newer checkpoints that cannot be used; each has been renamed."""

    @property
    def changed_versions(self) -> dict[str, str]:
        """Return the packages whose versions differ from those that wrote it: name -> "old -> new"."""
        old, new = self.manifest.versions, versions()
        return {name: f"{old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]}

    def load(self, student: Student) -> RunState:
        """Load the checkpoint's weights and optimizer state into `student`; return its state of the run. Collective."""
        return RunState.from_json(student.load(self.directory, TAG, self.manifest.world_size))


def find_start(config: Config, comm: Comm, at_most: int | None = None) -> Start | None:
    """Return the checkpoint that the run continues from, or None if it begins anew. Collective.

    With `at_most` it is the newest checkpoint of the run itself up to that step, or None.

    Raises CheckpointError if there are checkpoints and none can be used.
    """
    if comm.rank == 0:
        remove_partial(config.run_dir)
    found = usable_checkpoint(config.run_dir, comm, at_most)
    if found is not None:
        directory, manifest, passed = found
        start = Start(directory, manifest, passed=passed)
    elif config.init_from is not None and not (config.init_as == "phase" and at_most is not None):
        directory, manifest = source_checkpoint(config.init_from)
        if not is_intact(directory, manifest, comm):
            raise CheckpointError(f"init_from: {directory} is damaged, its files are not what their hashes say")
        start = Start(directory, manifest, kind=config.init_as)
    else:
        return None
    if start.manifest.world_size != comm.world_size and config.optimizer.offload == "nvme":
        raise CheckpointError(
            f"{start.directory} was written by {start.manifest.world_size} ranks, this run has {comm.world_size}, and "
            f"optimizer.offload is nvme, whose states stay on each node: start it on {start.manifest.world_size} ranks"
        )
    return start


def read_roll_backs(run_dir: Path, comm: Comm) -> list[dict[str, Any]]:
    """Return the roll-backs of the run so far, as `roll_back` wrote them. Collective."""
    path, on_rank_0 = run_dir / ROLL_BACKS, comm.rank == 0
    done: list[dict[str, Any]] = comm.broadcast_object(
        call_together(comm, lambda: _roll_backs(path) if on_rank_0 and path.is_file() else [])
    )
    return done


def _roll_backs(path: Path) -> list[dict[str, Any]]:
    mend = "put it back from a copy; without one, begin under another name (init_from)"
    entries = read_json(path, mend)
    try:
        if all(type(entry[key]) is int for entry in entries for key in ("step", "failed_step", "skip_until")):
            return list(entries)
    except (TypeError, KeyError):
        pass
    raise CheckpointError(f"{path} is damaged: it holds no list of roll-backs; {mend}")


def source_checkpoint(init_from: str) -> tuple[Path, Manifest]:
    """Return the checkpoint at `init_from`, or the newest complete one if that is the directory of a run.

    Raises CheckpointError if there is none, or another version of ddk_ds wrote it.
    """
    path = Path(init_from)
    manifest = read_manifest(path)
    if manifest is not None:
        return path, manifest
    newest = next(complete_checkpoints(path / "checkpoints"), None)
    if newest is None:
        for directory in (path, *sorted((path / "checkpoints").glob("step-*"))):
            if (other := other_format(directory)) is not None:
                raise CheckpointError(
                    f"init_from: {directory} has format {other}, this version of ddk_ds reads format {FORMAT}: "
                    "fork it with the version that wrote it"
                )
        raise CheckpointError(
            f"init_from: {path} is neither a complete checkpoint (<run>/checkpoints/step-...) nor the directory of a "
            "run that has one"
        )
    return newest


def check_source(init_from: str, init_as: Literal["fork", "phase"], identity: dict[str, Any]) -> str:
    """Return the hash of the checkpoint at `init_from`, if a run of that identity can begin from it.

    Raises CheckpointError, naming the first differences, if it cannot.
    """
    directory, manifest = source_checkpoint(init_from)
    common = _COMMON[init_as] + (_of_controller(identity) if init_as == "fork" else ())
    differing = [key for key in changed_keys(manifest.run, identity, Config) if key.startswith(common)]
    if differing:
        shown = "; ".join(f"{key} was {manifest.run.get(key)!r}, is {identity.get(key)!r}" for key in differing[:4])
        raise CheckpointError(
            f"init_from: {directory} cannot continue under this configuration: {shown}. {_KEEPS[init_as]}"
        )
    same = [key for key in identity if key.startswith("content.domains.") and manifest.run.get(key) == identity[key]]
    if init_as == "phase" and same and manifest.run["seed"] == identity["seed"]:
        raise CheckpointError(
            f"init_from: {directory} was trained on the same shards of {same[0].removeprefix('content.domains.')}, "
            f"and with seed {identity['seed']} this phase would read them in the same order again: set another seed"
        )
    return size_and_xxh64(directory / MANIFEST)[1]


def _of_controller(identity: dict[str, Any]) -> tuple[str, ...]:
    """Return the keys that a fork's controller needs as they were: it continues from what it has kept or measured."""
    keys: tuple[str, ...] = ()
    if identity.get("mixture.controller") in _WITH_MEMORY:
        keys += ("mixture.controller", "mixture.exclude")
    if identity.get("mixture.source") == "training":
        keys += ("mixture.source",)
    return keys


def restore(run: Run, start: Start) -> None:
    """Restore weights, optimizer, state and ledger of the run from a checkpoint. Collective.

    Raises CheckpointError if its data order or ledger are not this run's.
    """
    fresh = run.state
    loaded = start.load(run.student)
    if start.kind == "phase":
        run.ledger.rewind(0)
        return
    run.state = loaded
    run.state.data.check_fits(fresh.data)
    if start.kind == "fork" and run.config.loss.chunk_tokens is not None:
        run.state.chunk_tokens = fresh.chunk_tokens
    run.head_options = replace(run.head_options, chunk_tokens=run.state.chunk_tokens)
    run.ledger.rewind(0 if start.kind == "fork" else start.manifest.ledger_bytes)
    for passed in start.passed:
        message = f"warning: {passed.path} {passed.reason}; continuing from an older one"
        run.announce("damaged", message, path=str(passed.path), reason=passed.reason)
    done = read_roll_backs(run.config.run_dir, run.runtime.comm)
    positions = [entry["skip_until"] for entry in done if entry["step"] == run.state.step]
    run.state.skip_until = max([run.state.skip_until, *positions])


def roll_back(run: Run, reason: str) -> bool:
    """Restore the last checkpoint before the bad steps, leave out the samples since then, and return True. Collective.

    Return False if the configuration allows no further roll-back or there is no checkpoint. The roll-back and its
    `reason` are written to roll_backs.json: if the run is killed before its next checkpoint, it leaves out the same
    samples when it is started again.
    """
    config, comm = run.config, run.runtime.comm
    done = read_roll_backs(config.run_dir, comm)
    if len(done) >= config.guard.roll_backs:
        return False
    failed, skip_until = run.state.step, run.state.position
    run.watchdog.watch("restore", failed)
    good_step = run.state.good_step
    start = find_start(config, comm, at_most=good_step)
    if start is None:
        return False
    leave_out_after(config.run_dir, good_step, comm)  # a run that was interrupted amid bad steps has saved there
    if comm.rank == 0:
        entry = {"step": start.manifest.step, "failed_step": failed, "skip_until": skip_until, "reason": reason}
        write_text(config.run_dir / ROLL_BACKS, json.dumps([*done, entry], indent=1))
    comm.barrier()
    restore(run, start)
    step, left_out = run.state.step, skip_until - run.state.position
    message = f"warning: {reason}. Rolled back to step {step}; the {left_out:,} samples since then are left out"
    run.announce("roll_back", message, step=step, failed_step=failed, skip_until=skip_until, reason=reason)
    return True
