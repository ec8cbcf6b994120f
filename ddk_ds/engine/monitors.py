"""Writers of a run's numbers to monitors: TensorBoard, Weights & Biases and CSV through DeepSpeed, and Prometheus."""

from __future__ import annotations

import csv
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

from ddk_ds.config import Monitor
from ddk_ds.errors import ConfigError
from ddk_ds.files import write_text


class Event(NamedTuple):
    """A number of the run, or a text, at one step."""

    name: str
    """The group and the name within it, separated by a slash: loss/ce, ratio/books."""
    value: float | str
    step: int


BY_DOMAIN = ("student_ppl", "teacher_ppl", "ratio", "proportion", "domain_tokens")
"""Groups in which the names are those of the domains."""
OF_MEASUREMENTS = ("mixture", "measurement")
"""The other groups that are written at measurements, not at each step."""

# Longer than a computer that is busy may take between two connections to the service.
_SERVICE_IDLE = "1m"

Writer = Callable[[Sequence[Event]], None]
"""Writes events to one monitor; can raise any exception of the monitor's library."""


def open_writers(monitor: Monitor, run_dir: Path, name: str, step: int) -> dict[str, Writer]:
    """Return by name the writers that the configuration asks for, on rank 0, for a run that continues from `step`.

    Raises ConfigError if a monitor cannot be opened.
    """
    try:
        return _open_writers(monitor, run_dir / "monitor", name, step)
    except Exception as error:  # libraries and remote services can raise anything
        raise ConfigError(
            f"section monitor: {error}; mend that, or leave the monitor out (WANDB_MODE=offline keeps what is for "
            "Weights & Biases on the disk, to be sent later)"
        ) from error


def _open_writers(monitor: Monitor, folder: Path, name: str, step: int) -> dict[str, Writer]:
    # Each of DeepSpeed's monitors writes to <output_path>/<job_name>.
    sections: dict[str, dict[str, Any]] = {
        "tensorboard": {"enabled": monitor.tensorboard},
        "csv_monitor": {"enabled": monitor.csv},
        "wandb": {"enabled": monitor.wandb_project is not None},
    }
    for key, job_name in (("tensorboard", "tensorboard"), ("csv_monitor", "csv")):
        sections[key] |= {"output_path": str(folder), "job_name": job_name}
    if monitor.wandb_project is not None:
        sections["wandb"] |= {"project": monitor.wandb_project, "team": monitor.wandb_entity}
        _name_for_wandb(folder, name)
        _start_service_of_wandb()
    writers: dict[str, Writer] = {}
    if monitor.tensorboard or monitor.csv or monitor.wandb_project is not None:
        master = MonitorMaster(get_monitor_config(sections))
        if master.csv_monitor is not None:
            # The monitor writes a header to each file that is not in `filenames`.
            master.csv_monitor.filenames = _drop_after(folder / "csv", step)
        if master.tb_monitor is not None:
            writers["tb"] = partial(_write_tensorboard, master.tb_monitor)
        if master.wandb_monitor is not None:
            writers["wandb"] = master.wandb_monitor.write_events
        if master.csv_monitor is not None:
            writers["csv"] = lambda events: master.csv_monitor.write_events(_numbers(events))
    if monitor.prometheus_file is not None:
        writers["prometheus"] = _Prometheus(Path(monitor.prometheus_file), name).write
    return writers


def _numbers(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event.value, str)]


def _write_tensorboard(monitor: Any, events: Sequence[Event]) -> None:
    for event in events:
        if isinstance(event.value, str):
            monitor.summary_writer.add_text(*event)
    monitor.write_events(_numbers(events))


def close_writers() -> None:
    """Wait until everything is written. Weights & Biases writes in a separate process, and waits only at exit."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        run.finish()


def _name_for_wandb(folder: Path, name: str) -> None:
    """Set the environment variables by which a resumed run continues as the same run in Weights & Biases.

    Variables that the user has set are kept.
    """
    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    kept = folder / "wandb" / "ddk_run_id"  # a path would be another machine's too, or that of a run since deleted
    if not kept.is_file():
        write_text(kept, secrets.token_hex(8))
    variables = {"WANDB_DIR": str(folder), "WANDB_NAME": name, "WANDB_RUN_ID": kept.read_text()}
    variables["WANDB_RESUME"] = "allow"
    for key, value in variables.items():
        os.environ.setdefault(key, value)


def _start_service_of_wandb() -> None:
    """Start the process that Weights & Biases writes with, as no child of this one.

    A launcher that was told to end sends SIGTERM to all that its ranks have started. That process would end first, and
    the last numbers would be lost. Like this it ends when nobody has used it for a while. A service that the user has
    started (WANDB_SERVICE) is kept. Raises RuntimeError if it cannot be started.
    """
    if "WANDB_SERVICE" in os.environ:
        return
    command = [sys.executable, "-m", "wandb", "beta", "core", "start", "--idle-timeout", _SERVICE_IDLE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`wandb beta core start` failed: {done.stderr.strip()[-500:]}")
    os.environ["WANDB_SERVICE"] = done.stdout.strip()


def _drop_after(folder: Path, step: int) -> list[str]:
    """Remove from the CSV files of `folder` the lines that a run will write again when it resumes from `step`.

    These are the lines after `step`, and a measurement at `step` itself: a run that resumes at the border of two
    intervals repeats it. Return the names of all the CSV files, without ".csv".
    """
    paths = sorted(folder.glob("*.csv"))
    for path in paths:
        last = step - path.name.startswith(tuple(f"{group}_" for group in (*BY_DOMAIN, *OF_MEASUREMENTS)))
        with path.open(newline="") as stream:
            lines = list(csv.reader(stream))
        kept = [line for line in lines if not line[0].isdigit() or int(line[0]) <= last]
        if len(kept) < len(lines):
            write_text(path, "".join(",".join(line) + "\n" for line in kept))
    return [path.stem for path in paths]


class _Prometheus:
    """A file with the newest values as gauges ddk_ds_<group>_<name>, labelled with the run and, if any, the domain."""

    def __init__(self, path: Path, run: str) -> None:
        self._path = path
        self._run = run
        self._newest: dict[str, float] = {}

    def write(self, events: Sequence[Event]) -> None:
        """Replace the file by one with the values of these and all earlier events."""
        from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

        self._newest |= {event.name: float(event.value) for event in _numbers(events)}
        self._newest["run/step"] = max((event.step for event in events), default=0)
        self._newest["run/written_s"] = time.time()
        registry, gauges = CollectorRegistry(), {}
        for name, value in self._newest.items():
            group, _, last = name.partition("/")
            domain = group in BY_DOMAIN
            metric = f"ddk_ds_{group}" if domain else f"ddk_ds_{group}_{last}"
            labels = {"run": self._run} | ({"domain": last} if domain else {})
            if metric not in gauges:
                gauges[metric] = Gauge(metric, f"{name} of the ledger", list(labels), registry=registry)
            gauges[metric].labels(**labels).set(value)
        write_to_textfile(str(self._path), registry)
