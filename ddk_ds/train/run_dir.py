"""The run's directory: whose it is, and whether this run may write there."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import IO, Any

from ddk_ds.config import Config, Doremi, Loss, Mixture, Ted, to_yaml
from ddk_ds.errors import CheckpointError
from ddk_ds.files import nearest_existing, write_text
from ddk_ds.train.checkpoint.checkpoint_files import newest_checkpoint
from ddk_ds.train.checkpoint.restore import check_fork

# What may differ between two starts of one run: where things lie and how fast they go, not what is computed.
_FREE = {
    "name": True,
    "output_dir": True,
    "init_from": True,  # its content's hash is in the identity
    "checkpoint": True,
    "guard": True,
    "limits": True,
    "monitor": True,
    "data": {"path", "num_workers", "cache_dir", "cache_limit_gb", "download_timeout_s", "download_retries"},
    "student": {"path"},
    "teacher": {"path", "shard_within", "micro_batches_per_pass", "whole_layers"},
    "train": {"micro_batch_samples"},
    "ted": {"filters"},  # its content's hash is in the identity
}
_INIT_FROM = "content.init_from"
# What steps were before there were options for it.
_WAS = {
    "student": {"whole_layers": False, "compile_layers": False},
    "teacher": {"compile_layers": False, "quantize": "none"},
    "optimizer": {"fused": False},
}


def run_identity(config: Config, fingerprints: dict[str, Any]) -> dict[str, Any]:
    """Everything that the run's numbers depend on, flat: dotted configuration keys and content fingerprints.

    Raises CheckpointError where `init_from` does not fit.
    """
    values = config.model_dump(mode="json", exclude=_FREE)  # type: ignore[arg-type]
    identity = _flatten({**values, "content": fingerprints})
    if config.init_from is not None:
        # Once the run has a checkpoint of its own, the one that it began with may be gone.
        began = newest_checkpoint(config.run_dir)
        known = None if began is None else began[1].run.get(_INIT_FROM)
        identity[_INIT_FROM] = known or check_fork(config.init_from, identity)
    return identity


def claim_run_dir(config: Config, identity: dict[str, Any]) -> None:
    """Make the run's directory, lock it and note whose it is (rank 0 only; after `check_run_dir`).

    Raises CheckpointError where another process runs in it.
    """
    config.run_dir.mkdir(parents=True, exist_ok=True)
    _lock(config.run_dir)
    write_text(config.run_dir / "run.json", json.dumps(identity, indent=1))
    write_text(config.run_dir / "config.yaml", to_yaml(config))


def check_run_dir(config: Config, identity: dict[str, Any]) -> None:
    """Raise CheckpointError where the directory holds another run, or this one and `checkpoint.resume: never`."""
    run_dir = config.run_dir
    existing = nearest_existing(run_dir)
    try:  # permissions say too little: of read-only disks, quotas and special file systems they know nothing
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise CheckpointError(f"output_dir: {run_dir} cannot be written: {existing}: {error.strerror}") from error
    owner = run_dir / "run.json"
    if not owner.is_file():
        if run_dir.exists() and any(path.name not in (".lock", "slurm") for path in run_dir.iterdir()):
            raise CheckpointError(f"{run_dir} holds files of something else; set name or output_dir to a new directory")
        return
    stored = json.loads(owner.read_text())
    stored.pop("train.micro_batch_samples", None)  # older directories hold it; it is free now
    stored |= _later_options(stored)
    changed = [key for key in {**stored, **identity} if stored.get(key) != identity.get(key)]
    if changed:
        shown = "; ".join(f"{key} was {stored.get(key)!r}, is {identity.get(key)!r}" for key in sorted(changed)[:4])
        raise CheckpointError(f"{run_dir} holds another run: {shown}. Set another name, or the values it had")
    if config.checkpoint.resume == "never" and (run_dir / "ledger.jsonl").is_file():
        raise CheckpointError(f"{run_dir} holds this run already and checkpoint.resume is never: set another name")
    checkpoints = run_dir / "checkpoints"
    if newest_checkpoint(run_dir) is None and any((*checkpoints.glob("step-*"), *checkpoints.glob("broken-*"))):
        raise CheckpointError(f"{run_dir}/checkpoints: none is complete; mend or move them before starting anew")


_locks: dict[Path, IO[str]] = {}  # held until this process ends


def _lock(run_dir: Path) -> None:
    """Hold the directory until this process ends: two runs in one would mix their ledgers."""
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
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {platform.node()}")
    stream.flush()
    _locks[run_dir] = stream


def _later_options(stored: dict[str, Any]) -> dict[str, Any]:
    """The options that there were not yet when the directory was made, as the run is without them."""
    sections = {"mixture": Mixture(), "loss": Loss(), "ted": Ted(), "doremi": Doremi()}
    defaults = _flatten({name: section.model_dump(mode="json") for name, section in sections.items()})
    # A mapping that holds anything is stored by its parts.
    there = {".".join(key.split(".")[:2]) for key in stored}
    parts = {key.split(".")[0] for key, value in stored.items() if value is not None}
    defaults |= _flatten({name: section for name, section in _WAS.items() if name in parts})
    return {key: value for key, value in defaults.items() if key not in there}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
