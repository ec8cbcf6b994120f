"""What a submission leaves beside its logs: the resolved configuration, the code's version, the batch script."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import distributions
from pathlib import Path

from ddk_ds.config import Config, to_yaml
from ddk_ds.errors import UserError
from ddk_ds.files import write_text
from launch.slurm.script import ROOT


def next_snapshot(config: Config) -> Path:
    """Absolute path of the first number that no submission of this run has taken. Makes nothing."""
    folder = (config.run_dir / "slurm").absolute()
    number = 1
    while (folder / str(number)).exists():
        number += 1
    return folder / str(number)


def write_snapshot(folder: Path, config: Config, script: str) -> None:
    """Fill `folder`, which must not be there yet. Raises UserError where it cannot be made."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from error
    changes = _git("diff", "--binary", "HEAD")
    write_text(folder / "config.yaml", to_yaml(config))
    write_text(folder / "code.json", json.dumps(_code(bool(changes)), indent=1) + "\n")
    if changes:
        write_text(folder / "diff.patch", changes)
    write_text(folder / "job.sbatch", script)


def _code(changed: bool) -> dict[str, object]:
    """Of the environment this holds nothing: variables may be secrets."""
    packages = {item.name: item.version for item in distributions()}
    return {
        "commit": (_git("rev-parse", "HEAD") or "").strip() or None,
        "changed": changed,
        "python": platform.python_version(),
        "packages": dict(sorted(packages.items())),
    }


def _git(*arguments: str) -> str | None:
    """What git says of the project; None where it is not a checkout, or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode("utf-8", "surrogateescape")
