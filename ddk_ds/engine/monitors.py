"""Monitors that a run's numbers go to: TensorBoard, Weights & Biases and CSV by DeepSpeed's, and Prometheus."""

from __future__ import annotations

import csv
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

from ddk_ds.config import Monitor
from ddk_ds.errors import ConfigError
from ddk_ds.files import write_text


class Event(NamedTuple):
    """A number at a step."""

    name: str
    """A group and a name in it, with a slash between: loss/ce, ratio/books."""
    value: float
    step: int


# Groups whose names are the domains, and the others that a measurement has.
BY_DOMAIN = ("student_ppl", "teacher_ppl", "ratio", "proportion", "domain_tokens")
OF_MEASUREMENTS = ("mixture", "measurement")

# Raises whatever the library raises.
Writer = Callable[[Sequence[Event]], None]


def open_writers(monitor: Monitor, run_dir: Path, name: str, step: int) -> dict[str, Writer]:
    """The writers that the configuration asks for, by name, for a run that goes on from `step`; for rank 0.

    Raises ConfigError where one cannot be opened.
    """
    try:
        return _open_writers(monitor, run_dir / "monitor", name, step)
    except Exception as error:  # of a library, of a service somewhere: anything
        raise ConfigError(
            f"section monitor: {error}; mend that, or leave the monitor out (WANDB_MODE=offline keeps what is for "
            "Weights & Biases on the disk, to be sent later)"
        ) from error


def _open_writers(monitor: Monitor, folder: Path, name: str, step: int) -> dict[str, Writer]:
    # DeepSpeed's objects each write to <output_path>/<job_name>.
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
    writers: dict[str, Writer] = {}
    if monitor.tensorboard or monitor.csv or monitor.wandb_project is not None:
        master = MonitorMaster(get_monitor_config(sections))
        if master.csv_monitor is not None:
            # It writes a header where it has not itself written to the file yet.
            master.csv_monitor.filenames = _keep_until(folder / "csv", step)
        for kind in ("tb_monitor", "wandb_monitor", "csv_monitor"):
            if (one := getattr(master, kind)) is not None:
                writers[kind.removesuffix("_monitor")] = one.write_events
    if monitor.prometheus_file is not None:
        writers["prometheus"] = _Prometheus(Path(monitor.prometheus_file), name).write
    return writers


def close_writers() -> None:
    """Wait until everything is written: Weights & Biases has a process of its own, and would do so at exit alone."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        run.finish()


def _name_for_wandb(folder: Path, name: str) -> None:
    """A run that is resumed goes on as the same run; the user's own environment comes first."""
    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    where = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    ours = {"WANDB_DIR": str(folder), "WANDB_NAME": name, "WANDB_RUN_ID": where, "WANDB_RESUME": "allow"}
    for key, value in ours.items():
        os.environ.setdefault(key, value)


def _keep_until(folder: Path, step: int) -> list[str]:
    """Take out of the files what a run that goes on from `step` will write again; the names of the files.

    It measures anew at this step where that is a border of intervals.
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
    """The newest values as gauges ddk_ds_<group>_<name>, labelled with the run and, where there is one, the domain."""

    def __init__(self, path: Path, run: str) -> None:
        self._path = path
        self._run = run
        self._newest: dict[str, float] = {}

    def write(self, events: Sequence[Event]) -> None:
        """Replace the file."""
        from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

        self._newest |= {event.name: event.value for event in events}
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
