"""The directory of a run: which run it belongs to, and whether this one may write there."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import IO, Any

from ddk_ds.config import Config, to_yaml
from ddk_ds.config.keys import changed_keys, flatten
from ddk_ds.errors import CheckpointError
from ddk_ds.files import is_leftover, nearest_existing, read_object, remove_leftovers, sync, write_text, written
from ddk_ds.train.checkpoint.checkpoint_files import FORMAT, newest_checkpoint
from ddk_ds.train.checkpoint.restore import check_source

# Options that may differ between two starts of one run: they say where things lie and how fast it runs, and change
# no number.
_FREE = {
    "name": True,
    "output_dir": True,
    "init_from": True,  # the hash of its content is in the identity
    "checkpoint": True,
    "guard": True,
    "limits": True,
    "monitor": True,
    "data": {
        *("path", "allow_other_cuts", "num_workers"),
        "documents",  # what it stands for is in the identity
        *("cache_dir", "cache_limit_gb", "download_timeout_s", "download_patience_s"),
    },
    "student": {"path", "attn_implementation"},  # the kernel that it stands for is in the identity
    "teacher": {
        **dict.fromkeys(
            ("path", "by_domain", "attn_implementation", "shard_within", "micro_batches_per_pass", "whole_layers"), True
        ),
        "cache": {"path", "mode"},
    },
    "mixture": {"schedule_file"},  # the hash of its content is in the identity
    "train": {"micro_batch_samples", "sequence_parallel", "nvme_path"},
    "ted": {"filters"},  # the hash of its content is in the identity
}
_INIT_FROM = "content.init_from"
_MEND_OWNER = (
    'put back a copy (the object "run" in the manifest.json of its checkpoints is one), or start under another name'
)


def run_identity(config: Config, fingerprints: dict[str, Any]) -> dict[str, Any]:
    """Return all that the run's numbers depend on, flat: format, dotted configuration keys, content fingerprints.

    Raises CheckpointError if `init_from` does not fit.
    """
    values = config.model_dump(mode="json", exclude=_FREE)  # type: ignore[arg-type]
    if config.teacher is not None and config.teacher.compiled_whole:
        values["teacher"]["compile_layers"] = "whole"  # the one case in which the place of its weights changes numbers
    identity = flatten({"format": FORMAT, **values, "content": fingerprints})
    if config.init_from is not None:
        # Once the run has a checkpoint of its own, the one that it was forked from may be deleted.
        newest = newest_checkpoint(config.run_dir)
        known = None if newest is None else newest[1].run.get(_INIT_FROM)
        identity[_INIT_FROM] = known or check_source(config.init_from, config.init_as, identity)
    return identity


def claim_run_dir(config: Config, identity: dict[str, Any]) -> None:
    """Make the run's directory, lock it and write its identity to run.json (rank 0 only; after `check_run_dir`).

    Raises CheckpointError if another process runs in it, or if it cannot be written.
    """
    with written(config.run_dir):
        config.run_dir.mkdir(parents=True, exist_ok=True)
        _lock(config.run_dir)
        remove_leftovers(config.run_dir, age_s=0.0)  # with the lock, whoever left them is dead
        write_text(config.run_dir / "run.json", json.dumps(identity, indent=1))
        write_text(config.run_dir / "config.yaml", to_yaml(config))
    sync(config.run_dir.parent)


def check_run_dir(config: Config, identity: dict[str, Any]) -> None:
    """Raise CheckpointError if the directory cannot be written or holds anything but this run in this format.

    Raise it also if the directory holds this run and `checkpoint.resume` is never, or if none of its checkpoints is
    complete.
    """
    run_dir = config.run_dir
    existing = nearest_existing(run_dir)
    try:  # permissions do not tell of read-only disks, quotas and special file systems
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise CheckpointError(f"output_dir: {run_dir} cannot be written: {existing}: {error.strerror}") from error
    owner = run_dir / "run.json"
    if not owner.is_file():
        foreign = [
            path
            for path in (run_dir.iterdir() if run_dir.exists() else ())
            if path.name not in (".lock", "slurm") and not is_leftover(path)
        ]
        if foreign:
            raise CheckpointError(f"{run_dir} holds files of something else; set name or output_dir to a new directory")
        return
    stored = read_object(owner, _MEND_OWNER)
    if stored.get("format") != FORMAT:
        raise CheckpointError(
            f"{run_dir} has format {stored.get('format')}, this version of ddk_ds reads and writes format {FORMAT}: "
            "continue it with the version that wrote it, or set another name"
        )
    if changed := changed_keys(stored, identity, Config):
        shown = "; ".join(f"{key} was {stored.get(key)!r}, is {identity.get(key)!r}" for key in changed[:4])
        raise CheckpointError(f"{run_dir} holds another run: {shown}. Set another name, or the values it had")
    if config.checkpoint.resume == "never" and (run_dir / "ledger.jsonl").is_file():
        raise CheckpointError(f"{run_dir} holds this run already and checkpoint.resume is never: set another name")
    checkpoints = run_dir / "checkpoints"
    if newest_checkpoint(run_dir) is None and any((*checkpoints.glob("step-*"), *checkpoints.glob("broken-*"))):
        raise CheckpointError(f"{run_dir}/checkpoints: none is complete; mend or move them before starting anew")


_locks: dict[Path, IO[str]] = {}  # held until this process ends


def _lock(run_dir: Path) -> None:
    """Lock the directory until this process ends: two runs in it would mix their ledgers."""
    if run_dir in _locks:
        return
    stream = (run_dir / ".lock").open("a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.seek(0)
        raise CheckpointError(
            f"{run_dir}: {stream.read().strip() or 'another process'} is running in it; stop that, or wait for its end"
        ) from error
    except OSError:  # a file system without locks
        return
    _locks[run_dir] = stream
    stream.truncate(0)
    os.write(stream.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
