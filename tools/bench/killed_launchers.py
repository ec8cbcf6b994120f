"""Signals to the one process of a run that a user holds: `deepspeed` or `ddk distill`, at chosen moments of the run."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np

from tools.bench.fault_cases import Case, Setting
from tools.bench.faults import FRONTS, Job

LAUNCHER = "launcher got a signal"
# Moment -> least and most seconds after it begins.
MOMENTS = {
    "launcher's imports": (0.0, 0.8),
    "ranks' imports": (0.0, 2.0),
    "group start-up": (0.0, 0.3),
    "model loading": (0.0, 0.3),
    "start-up perplexities": (0.2, 0.8),
    "training": (0.0, 0.2),
    "evaluation": (0.0, 0.02),
    "checkpoint": (0.0, 0.02),
    "export": (0.0, 0.02),
    "end": (0.0, 0.2),
}
SIGNALS = (signal.SIGTERM, signal.SIGKILL)
_RANKS = 2
_LIBRARY = "deepspeed_shm_comm"  # the library by which ranks on a CPU meet, loaded right before they do


def launcher_faults(setting: Setting, count: int, rng: np.random.Generator) -> Iterator[Case]:
    """Send a signal to the launcher of `count` runs, and yield what came of their next starts.

    Launchers and signals alternate, so that few cases have all moments.
    """
    chosen = list(product(MOMENTS, FRONTS, SIGNALS))
    firsts = [(place + turn) % 4 + 4 * place for turn in range(4) for place in range(len(MOMENTS))]
    for number, place in enumerate(firsts[:count]):
        moment, front, sent = chosen[place]
        name = f"launcher-{number:03d}"
        config = setting.config(name)
        run_dir = config.parent / "runs/run"
        job = Job(config, run_dir, _RANKS, front)
        job.start()
        _wait(job, moment)
        time.sleep(float(rng.uniform(*MOMENTS[moment])))
        job.processes()
        phase, began = job.phase()[0] or "no record", time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            job.send(sent)
        code = job.end_by_itself()
        ended_s = round(time.monotonic() - began, 2)
        case = Case(LAUNCHER, f"{sent.name} to {front}, {moment} ({phase})", (_RANKS, _RANKS), [code], ended_s)
        if code is None:
            case.broken.append("processes left")
        if code == 0 and not (run_dir / "summary.json").exists():
            case.broken.append("code 0 for a run that is not finished")
        setting.start_again(case, config, run_dir, _RANKS)
        if not case.broken:
            shutil.rmtree(config.parent)
        yield case


def _wait(job: Job, moment: str) -> None:
    """Wait until the moment has begun, or until the run has ended."""
    run_dir = job.run_dir
    while not job.ended:
        phase, step = job.phase()
        begun = {
            "launcher's imports": True,
            "ranks' imports": bool(job.ranks()),
            "group start-up": moment != "group start-up" or any(_maps(rank.pid) for rank in job.ranks()),
            "model loading": (run_dir / "config.yaml").exists(),
            "start-up perplexities": (run_dir / "config.yaml").exists(),
            "checkpoint": any((run_dir / "checkpoints").glob(".partial-step-*")),
            "end": (run_dir / "summary.json").exists(),
        }
        if begun.get(moment, phase == moment and step > 0):
            return
        time.sleep(0.002)


def _maps(process: int) -> bool:
    with contextlib.suppress(OSError):
        return bool(re.search(_LIBRARY, Path(f"/proc/{process}/maps").read_text()))
    return False
