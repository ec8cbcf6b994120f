"""The batch script of a run on Slurm, and the directory with the configuration and code version that it was made of.

The script is a template, job.sbatch, into which quoted values are inserted; nothing is run here.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

from ddk_ds.command_line import RANK_SCRIPT
from ddk_ds.config import Config, to_yaml
from ddk_ds.errors import UserError
from ddk_ds.files import write_text

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).with_name("job.sbatch")


@dataclass(frozen=True)
class Container:
    """An image in which the ranks run; the batch script itself runs on the host, which has Slurm's commands."""

    image: str
    runtime: Literal["pyxis", "apptainer"]
    mounts: tuple[str, ...]
    """Directories of the host that are mounted in the image under the same path."""
    gpus: bool
    """True if the ranks use GPUs."""


@dataclass(frozen=True)
class Job:
    """Everything that the batch script depends on."""

    name: str
    snapshot: Path
    """Absolute path of the directory for config.yaml and the logs."""
    workdir: Path
    """Absolute path of the directory in which the job starts: the one of its submission."""
    nodes: int
    ranks_per_node: int
    options: Mapping[str, str | None]
    """sbatch's long options and their values; None for an option without a value."""
    python: str
    """Interpreter of the ranks."""
    chained: bool = False
    """True if the job is one of a chain, so that it does not requeue itself."""
    array: str | None = None
    """Task ids of a job array, as sbatch takes them."""
    seed_from_task: bool = False
    """True if the run's seed is the task id."""
    cpus_per_task: int | None = None
    """Cores of a rank."""
    interface: str | None = None
    """Network interface that gloo and NCCL use."""
    container: Container | None = None


def render(job: Job) -> str:
    """Return the text of the batch script. Raises UserError if a value cannot be written into it."""
    values = {
        "sbatch_options": "\n".join(_directive(key, value) for key, value in _options(job).items()),
        "snapshot": _quoted(str(job.snapshot)),
        "name": _quoted(job.name),
        "chained": str(int(job.chained)),
        "ranks_per_node": str(job.ranks_per_node),
        "seed_from_task": str(int(job.seed_from_task)),
        "environment": "\n".join(_environment(job)),
        "srun_options": " ".join(_srun_options(job)),
        "command": " ".join(map(_quoted, _command(job))),
    }
    return re.sub(r"@([a-z_]+)@", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def _options(job: Job) -> dict[str, str | None]:
    log = str(job.snapshot).replace("%", "%%") + ("/%A_%a.log" if job.array else "/%j.log")
    options: dict[str, str | None] = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.ranks_per_node),
        "chdir": str(job.workdir),
        "output": log,
        "open-mode": "append",
        "requeue": None,
    }
    if job.array is not None:
        options["array"] = job.array
    if job.cpus_per_task is not None:
        options["cpus-per-task"] = str(job.cpus_per_task)
    return {**options, **job.options}


def _environment(job: Job) -> list[str]:
    lines = []
    if Path(job.python).is_absolute():
        # torch searches PATH for ninja.
        lines.append(f'export PATH={_quoted(str(Path(job.python).parent))}:"$PATH"')
    if job.cpus_per_task is not None:
        lines.append(f"export OMP_NUM_THREADS={job.cpus_per_task}")
    if job.interface is not None:
        lines += [f"export {key}={_quoted(job.interface)}" for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]
    return lines


def _srun_options(job: Job) -> list[str]:
    # Since Slurm 22.05 a step does not inherit the job's --cpus-per-task.
    options = [] if job.cpus_per_task is None else [f"--cpus-per-task={job.cpus_per_task}"]
    container = job.container
    if container is not None and container.runtime == "pyxis":
        options += [
            f"--container-image={container.image}",
            f"--container-mounts={','.join(f'{path}:{path}' for path in container.mounts)}",
            f"--container-workdir={job.workdir}",
        ]
    return [_quoted(option) for option in options]


def _command(job: Job) -> Sequence[str]:
    command = [job.python, str(RANK_SCRIPT), "--config", str(job.snapshot / "config.yaml")]
    container = job.container
    if container is None or container.runtime == "pyxis":
        return command
    binds = [word for path in container.mounts for word in ("--bind", f"{path}:{path}")]
    gpus = ["--nv"] if container.gpus else []
    return ["apptainer", "exec", *gpus, *binds, "--pwd", str(job.workdir), container.image, *command]


def _directive(key: str, value: str | None) -> str:
    return f"#SBATCH --{key}" if value is None else f"#SBATCH --{key}={_quoted(value)}"


def _quoted(value: str) -> str:
    # sbatch parses its directives like a shell, and each ends at the line's end.
    if not value.isprintable():
        raise UserError(f"{value!r} cannot stand in a batch script: it holds a line break or another control character")
    return shlex.quote(value)


def next_snapshot(config: Config) -> Path:
    """Return the absolute path of the first directory <run>/slurm/1, 2, ... that does not exist; create nothing."""
    folder = (config.run_dir / "slurm").absolute()
    number = 1
    while (folder / str(number)).exists():
        number += 1
    return folder / str(number)


def write_snapshot(folder: Path, config: Config, script: str) -> None:
    """Create `folder`, and write the configuration, the code's version with its uncommitted changes, and the script.

    Raises UserError if the directory cannot be created or exists.
    """
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from error
    changes = _git("diff", "--binary", "HEAD")
    write_text(folder / "config.yaml", to_yaml(config))
    write_text(folder / "code.json", json.dumps(_code_version(bool(changes)), indent=1) + "\n")
    if changes:
        write_text(folder / "diff.patch", changes)
    write_text(folder / "job.sbatch", script)


def _code_version(changed: bool) -> dict[str, object]:
    """Return the content of code.json: commit, Python's version, and the versions of all installed packages.

    `changed` is True if tracked files differ from the commit. Environment variables are not written, since they can
    hold secrets.
    """
    packages = {item.name: item.version for item in distributions()}
    return {
        "commit": (_git("rev-parse", "HEAD") or "").strip() or None,
        "changed": changed,
        "python": platform.python_version(),
        "packages": dict(sorted(packages.items())),
    }


def _git(*arguments: str) -> str | None:
    """Run git in this repository and return its output, or None if it fails, as outside a checkout or without git.

    A package that is installed somewhere below another project's checkout is outside.
    """
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode("utf-8", "surrogateescape")
