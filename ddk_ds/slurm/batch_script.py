"""The batch script of a run on Slurm, as text: a template and values that are quoted, never run here.

What a submission leaves beside its logs: the resolved configuration, the code's version, the batch script.
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

from ddk_ds.config import Config, to_yaml
from ddk_ds.errors import UserError
from ddk_ds.files import write_text

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).with_name("job.sbatch")


@dataclass(frozen=True)
class Container:
    """An image in which the ranks run. The batch script itself runs on the host, where Slurm's commands are."""

    image: str
    runtime: Literal["pyxis", "apptainer"]
    mounts: tuple[str, ...]
    """Directories of the host that the image sees under the same path."""
    gpus: bool


@dataclass(frozen=True)
class Job:
    """All that the batch script depends on."""

    name: str
    snapshot: Path
    """Absolute directory of config.yaml and of the logs."""
    workdir: Path
    """Absolute directory that the configuration's paths are relative to."""
    nodes: int
    ranks_per_node: int
    options: Mapping[str, str | None]
    """sbatch's long options; None: one without a value."""
    python: str
    chained: bool = False
    array: str | None = None
    seed_from_task: bool = False
    cpus_per_task: int | None = None
    interface: str | None = None
    """Network interface of the nodes that gloo and NCCL are bound to."""
    container: Container | None = None


def render(job: Job) -> str:
    """The batch script. Raises UserError where a value cannot stand in it."""
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
        # torch looks for ninja on PATH.
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
    command = [job.python, str(ROOT / "launch/distill.py"), "--config", str(job.snapshot / "config.yaml")]
    container = job.container
    if container is None or container.runtime == "pyxis":
        return command
    binds = [word for path in container.mounts for word in ("--bind", f"{path}:{path}")]
    gpus = ["--nv"] if container.gpus else []
    return ["apptainer", "exec", *gpus, *binds, "--pwd", str(job.workdir), container.image, *command]


def _directive(key: str, value: str | None) -> str:
    return f"#SBATCH --{key}" if value is None else f"#SBATCH --{key}={_quoted(value)}"


def _quoted(value: str) -> str:
    # sbatch reads its own lines as a shell would, and ends them where the line ends.
    if not value.isprintable():
        raise UserError(f"{value!r} cannot stand in a batch script: it holds a line break or another control character")
    return shlex.quote(value)


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
