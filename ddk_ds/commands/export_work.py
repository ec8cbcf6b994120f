"""The work of `ddk export`, apart from it because torch and DeepSpeed take seconds to import."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from ddk_ds.comm import SingleProcess
from ddk_ds.config import Config, load_run_config
from ddk_ds.engine.export import CheckpointExport, check_room, check_target
from ddk_ds.engine.model_files import DTYPES, ModelFiles, check_code, model_directory, read_model
from ddk_ds.engine.zero_shards import ZeroShards
from ddk_ds.errors import CheckpointError, ConfigError
from ddk_ds.files import size_and_xxh64, unwritable
from ddk_ds.train.checkpoint.checkpoint_files import TAG, Manifest, complete_checkpoints, damaged_since
from ddk_ds.train.run_end import companions
from ddk_ds.train.state import RunState

_ROOM = 1.01  # needed disk space over the weights' size, because of the other files


def export(options: argparse.Namespace, bar: Progress) -> tuple[Path, str]:
    """Write the directory that the options ask for, and return its path and a line that describes it."""
    if not options.max_shard_gb > 0:
        raise ConfigError(f"--max-shard-gb {options.max_shard_gb:g}: must be above 0")
    config = read_config(options.run, options.student)
    checkpoint, manifest = find_checkpoint(options.run, options.step)
    damaged = [] if options.step is not None else damaged_since(options.run, manifest.step)
    if damaged:
        found = f"{options.run}/checkpoints: {', '.join(damaged)} is damaged or of another version"
        print(f"warning: {found}; exporting step {manifest.step:,}", file=sys.stderr)
    dtype = options.dtype or config.train.precision
    out = options.out or options.run / "exports" / f"step-{manifest.step:08d}-{dtype}"
    check_target(out, overwrite=options.overwrite)
    files = student_files(config, manifest)
    _keep_apart(out, (options.run, files.directory))
    try:
        verify(checkpoint, manifest, bar)
        shards = ZeroShards(checkpoint / TAG, manifest.world_size)
        work = CheckpointExport(shards, files, DTYPES[dtype], trusted=config.student.trust_remote_code)
        check_room(out, int(_ROOM * work.num_bytes))
        companion_files = companions(
            options.run, config, files, RunState.from_json(shards.model_states["run"]), manifest.versions
        )
        task = bar.add_task("writing", total=work.num_bytes)
        work.write(
            out,
            companion_files,
            int(options.max_shard_gb * 1e9),
            lambda num_bytes: bar.advance(task, num_bytes),
            overwrite=options.overwrite,
        )
    except OSError as error:
        if not checkpoint.is_dir():
            deleted = f"{checkpoint} was deleted while it was read"
            raise CheckpointError(f"{deleted}: {_steps_message(options.run)}") from error
        raise unwritable(f"--out {out}", error, "give the same command again") from error
    return out, f"step {manifest.step:,}, {dtype}, {len(work.specs):,} tensors, {work.num_bytes:,} bytes"


def read_config(run: Path, student: str | None) -> Config:
    """Read the run's resolved configuration. Raises CheckpointError if `run` is not the directory of a run."""
    path = run / "config.yaml"
    if not path.is_file() or not (run / "checkpoints").is_dir():
        raise CheckpointError(f"{run}: holds no config.yaml and checkpoints/: give the directory of a run")
    return load_run_config(run, [] if student is None else [f"student.path={student}"])


def find_checkpoint(run: Path, step: int | None) -> tuple[Path, Manifest]:
    """Return the run's complete checkpoint of a step, or the newest. Raises CheckpointError if there is none."""
    found = {manifest.step: (directory, manifest) for directory, manifest in complete_checkpoints(run / "checkpoints")}
    if not found:
        raise CheckpointError(f"{run}/checkpoints: none is complete yet; wait for the run's next one")
    if step is not None and step not in found:
        raise CheckpointError(f"--step {step}: {_steps_message(run)}")
    return found[max(found) if step is None else step]


def _steps_message(run: Path) -> str:
    steps = sorted(manifest.step for _, manifest in complete_checkpoints(run / "checkpoints"))
    return f"{run} has complete checkpoints of steps {', '.join(map(str, steps)) or 'none'}"


def student_files(config: Config, manifest: Manifest) -> ModelFiles:
    """Return the model that the run began with. Raises ConfigError if it is missing or its files have changed."""
    directory = model_directory(config.student.path, "student.path", SingleProcess())
    files = read_model(directory, "student.path")
    check_code(files, "student", trusted=config.student.trust_remote_code)
    if files.fingerprint != manifest.run["content.student"]:
        raise ConfigError(
            f"student.path: {directory} is not the model that the run began with, its files have changed: name that by "
            "--student"
        )
    return files


def verify(checkpoint: Path, manifest: Manifest, bar: Progress) -> None:
    """Hash the checkpoint's files. Raises CheckpointError that names a damaged file."""
    task = bar.add_task("verifying", total=manifest.num_bytes)
    for name, (size, xxh64) in sorted(manifest.files.items()):
        if size_and_xxh64(checkpoint / name) != (size, xxh64):
            raise CheckpointError(f"{checkpoint / name} is damaged, it is not what its hash says: give another --step")
        bar.advance(task, size)


def _keep_apart(out: Path, sources: Sequence[Path]) -> None:
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise CheckpointError(f"--out {out}: {source} lies there, which the export is made from: name another")
