"""The engines of a preparation in parts: datatrove's executors for processes of this machine, Slurm and Ray.

Each stage is a pipeline of one step, run as a task of the executor for each part, with its logs, marks of completion
and, where it has them, retries. Only this file imports datatrove (the extra `data`).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor

from ddk_ds.command_line import mendable
from ddk_ds.data.blocks import Stage, deal, missing
from ddk_ds.data.encoding import end_with_parent
from ddk_ds.errors import ConfigError, DataError
from ddk_ds.files import write_text

EngineName = Literal["local", "slurm", "ray"]
_OURS = {"self", "pipeline", "tasks", "workers", "logging_dir", "depends", "skip_completed"}
_POLL_SECONDS = 2.0


class StageTask:
    """The step of a pipeline that does a part of a stage; an error that a user can mend goes to a file in `errors`."""

    def __init__(self, stage: Stage, errors: Path) -> None:
        """Store what every part needs; it is pickled for the tasks."""
        self._stage = stage
        self.errors = errors

    def __repr__(self) -> str:
        return f"ddk prepare: {self._stage.name}"

    def __call__(self, _data: Any, rank: int, world_size: int) -> None:
        """Make the results that are missing among the units of part `rank`."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the parts are the parallelism
        try:
            self._stage.run(missing(self._stage, deal(self._stage.weights, world_size)[rank]))
        except Exception as error:
            if found := mendable(error):
                self.errors.mkdir(exist_ok=True)
                write_text(self.errors / f"{rank:05}", found[0].removeprefix("error: "))
            raise

    def failed(self) -> bool:
        """Return True if a part ended with an error that a user can mend."""
        return self.errors.is_dir()


class Engine(Protocol):
    """Runs the parts of a stage that have no mark of completion in `logs`, and returns when no task is left."""

    def run(self, task: StageTask, logs: Path, parts: int) -> None:
        """Run the tasks; that some fail is no error here. Raises DataError if none can be started."""


def make_engine(name: EngineName, workers: int, options: Mapping[str, str]) -> Engine:
    """Return an engine.

    Args:
        workers: number of parts that run at a time; -1: no limit.
        options: arguments of datatrove's executor, as text, or as JSON where they are no text.

    Raises:
        ConfigError: the executor has no such argument.
    """
    executor = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}[name]
    known = sorted(set(inspect.signature(executor).parameters) - _OURS) if name != "local" else []
    for key in options:
        if key not in known:
            raise ConfigError(f"--engine-option {key}: the engine {name} has {', '.join(known) or 'no options'}")
    parsed = {key: _value(text) for key, text in options.items()}
    if name == "local":
        return _Local(workers)
    return _Slurm(workers, parsed) if name == "slurm" else _Ray(workers, parsed)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


class _Local:
    """Processes of this machine.

    datatrove's executor starts its tasks in a multiprocess.Pool, which waits for ever for a task whose process was
    killed, as one that takes too much memory is. So each task is a process here, and the executor does the rest.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def run(self, task: StageTask, logs: Path, parts: int) -> None:
        executor = LocalPipelineExecutor([task], tasks=parts, logging_dir=str(logs))
        waiting = executor.get_incomplete_ranks()
        context = multiprocessing.get_context("spawn")
        running: dict[Any, SpawnProcess] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._workers:
                    process = context.Process(target=_run_part, args=(executor, waiting.pop(0)))
                    process.start()
                    running[process.sentinel] = process
                for sentinel in wait(list(running)):
                    running.pop(sentinel).join()
                if task.failed():
                    return
        finally:
            for process in running.values():
                process.kill()
                process.join()


def _run_part(executor: LocalPipelineExecutor, rank: int) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):  # all is in the log of the part
        executor._run_for_rank(rank, local_rank=1)


class _SlurmExecutor(SlurmPipelineExecutor):
    """datatrove's executor without the job that adds up statistics, which waits for ever after a failed task."""

    def launch_merge_stats(self) -> None:
        """Launch nothing."""


class _Slurm:
    """An array of jobs, in which each task is a part. A job that runs when the preparation was killed is waited for."""

    def __init__(self, workers: int, options: dict[str, Any]) -> None:
        here = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
        self._options = {"qos": None, "job_name": "ddk-prepare", "env_command": here} | options
        self._workers = workers
        for key in ("time", "partition"):
            if key not in options:
                raise ConfigError(f"--engine slurm needs --engine-option {key}=..., an option of sbatch")

    def run(self, task: StageTask, logs: Path, parts: int) -> None:
        job = logs / "job"
        if not job.exists():
            options = {"max_array_size": parts} | self._options
            executor = _SlurmExecutor([task], tasks=parts, workers=self._workers, logging_dir=str(logs), **options)
            try:
                executor.run()
            except (OSError, subprocess.CalledProcessError) as error:
                raise DataError(
                    f"sbatch failed ({error}); {logs / 'launch_script.slurm'} is what it was given"
                ) from None
            write_text(job, str(executor.job_id))
        number = job.read_text()
        while _queued(number):
            if task.failed():
                subprocess.run(["scancel", number], check=False)
            time.sleep(_POLL_SECONDS)
        job.unlink()


def _queued(job: str) -> bool:
    """Return True while Slurm has a task of the job that is not at its end, and while Slurm does not answer."""
    asked = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False)
    if asked.returncode:
        return "Invalid job id" not in asked.stderr
    return bool(asked.stdout.strip())


class _Ray:
    """Actors of the Ray cluster that this machine belongs to, or that RAY_ADDRESS names."""

    def __init__(self, workers: int, options: dict[str, Any]) -> None:
        self._workers, self._options = workers, options
        try:
            import ray  # noqa: F401
        except ImportError:
            raise ConfigError("--engine ray needs Ray: uv pip install ray") from None

    def run(self, task: StageTask, logs: Path, parts: int) -> None:
        executor = RayPipelineExecutor(
            [task], tasks=parts, workers=self._workers, logging_dir=str(logs), **self._options
        )
        executor.run()


ENGINES = get_args(EngineName)
