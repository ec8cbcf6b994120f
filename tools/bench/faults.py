"""Faults of runs on clusters, inflicted on real processes and files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from ddk_ds.files import new_file, size_and_xxh64
from ddk_ds.launcher import free_port
from tools.bench.file_operations import fill
from tools.bench.forked import in_session
from tools.bench.small_run import ROOT

LIMIT_S = 60.0
"""Seconds after which a harmed job that has not ended counts as a hang."""
FRONTS = {
    "deepspeed": (
        *("-m", "deepspeed.launcher.runner", "--num_gpus", "{ranks}", "--master_port", "{port}"),
        *("launch/distill.py", "--config", "{config}"),
    ),
    "ddk distill": (
        *("-c", "import sys; from ddk_ds.commands.console import main; sys.exit(main())"),
        *("distill", "--ranks", "{ranks}", "--config", "{config}"),
    ),
}
"""Commands with which a user starts a run, by the name of their first process."""
DISK = "disk full"
DAMAGE = "checkpoint damaged"
_ALL = ("training", "evaluation", "controller", "checkpoint", "export")
MOMENTS = {
    "rank killed": _ALL,
    "all killed": _ALL,
    "launcher killed": _ALL,
    "preempted": _ALL,
    DISK: ("training", "evaluation", "checkpoint"),
    DAMAGE: ("training", "checkpoint", "export"),
}
KINDS = tuple(MOMENTS)
_TWO_CHECKPOINTS = 5  # steps after which the campaign's runs have two checkpoints
_PHASES = {"step": "training"}


class Job:
    """A run under a real launcher, in its own session."""

    def __init__(self, config: Path, run_dir: Path, ranks: int, front: str = "deepspeed") -> None:
        self.run_dir = run_dir
        self.killed = False
        """True if the job was killed because it did not end."""
        self._config = config
        self._ranks = ranks
        self._front = front
        self._output = config.with_suffix(".txt")
        self._session: list[psutil.Process] = []

    def start(self) -> None:
        """Start the launcher, which appends to the job's output."""
        values = {"ranks": self._ranks, "port": free_port(), "config": self._config}
        command = [sys.executable, *(word.format(**values) for word in FRONTS[self._front])]
        with self._output.open("a") as output:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process that a user has started. Raises ProcessLookupError if it has ended."""
        os.kill(self._process.pid, number)

    def finish(self, limit_s: float = 240.0) -> None:
        """Run to the end. Raises AssertionError with the output if the run fails, TimeoutError if it hangs."""
        self.start()
        try:
            code = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._kill()
            self.killed = True
            raise TimeoutError(f"not done after {limit_s} s\n{self._output.read_text()[-6000:]}") from None
        assert code == 0, self._output.read_text()[-6000:]

    def end_by_itself(self) -> int | None:
        """Wait for the end of every process. Returns the launcher's exit code, or None if they had to be killed."""
        end = time.monotonic() + LIMIT_S
        while self.processes():
            if time.monotonic() > end:
                self._kill()
                self.killed = True
                return None
            self._process.poll()
            time.sleep(0.02)
        return self._process.wait()

    def processes(self) -> list[psutil.Process]:
        """Return all living processes of the job, including orphans."""
        with contextlib.suppress(psutil.NoSuchProcess):
            known = psutil.Process(self._process.pid)
            self._session = list({*self._session, known, *known.children(recursive=True)})
        self._session = list({*self._session, *in_session(self._process.pid)})
        return [p for p in self._session if p.is_running() and _status(p) != psutil.STATUS_ZOMBIE]

    def ranks(self) -> list[psutil.Process]:
        """Return the training processes; processes that a rank has forked have another parent, and are left out."""
        launchers = {process.pid for process in self.launchers()}
        return [p for p in self.processes() if "--local_rank" in _command(p) and p.ppid() in launchers]

    def launchers(self) -> list[psutil.Process]:
        """Return the processes of DeepSpeed's runner and of the node's launcher."""
        return [p for p in self.processes() if "--local_rank" not in _command(p)]

    @property
    def ended(self) -> bool:
        """Return True if the launcher has ended."""
        return self._process.poll() is not None

    def phase(self) -> tuple[str, int]:
        """Return rank 0's phase and last step from its record; ("", 0) before the first record."""
        path = self.run_dir / "stacks/rank-0.txt"
        found = re.match(r"(\w+) after step (\d+)", path.read_text() if path.is_file() else "")
        return (_PHASES.get(found[1], found[1]), int(found[2])) if found else ("", 0)

    def _kill(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()


@dataclass(frozen=True)
class Fault:
    """A fault: its kind, and the moment at which it happens."""

    kind: str
    moment: str
    step: int
    """First step after which it can happen."""
    delay_s: float
    """Seconds from the moment to the fault."""
    rng: np.random.Generator
    """Generator that chooses ranks, files and bytes."""

    def strike(self, job: Job) -> tuple[str, float]:
        """Start the job and harm it. Returns the phase at that time, and the time in monotonic seconds."""
        job.start()
        self._wait(job)
        time.sleep(self.delay_s)
        job.processes()
        phase, step = job.phase()
        began = time.monotonic()
        if self.kind == "rank killed":
            ranks = job.ranks()
            _send(ranks[int(self.rng.integers(len(ranks)))] if ranks else None, signal.SIGKILL)
        elif self.kind == "launcher killed":
            for process in job.launchers():
                _send(process, signal.SIGKILL)
        elif self.kind == "preempted":
            ranks = job.ranks()
            _send(ranks[int(self.rng.integers(len(ranks)))] if ranks else None, signal.SIGUSR1)
        elif self.kind == DISK:
            fill(str(job.run_dir.parent))
        else:
            for process in job.processes():
                _send(process, signal.SIGKILL)
        return f"{phase} after step {step}" if phase else "", began

    def clear_up(self, job: Job) -> None:
        """Prepare the next start: free the disk, or damage the newest of several checkpoints."""
        if self.kind == DISK:
            (job.run_dir.parent / "ballast").unlink(missing_ok=True)
        intact = sorted(intact_checkpoints(job.run_dir))
        # Without an older checkpoint, a run refuses to start rather than begin anew, so it could not pass.
        if self.kind == DAMAGE and len(intact) > 1:
            files = sorted(path for path in intact[-1].rglob("*") if path.is_file())
            _damage(files[int(self.rng.integers(len(files)))], self.rng)

    def _wait(self, job: Job) -> None:
        # The export happens once, at the end. A run that ends before the moment comes is harmed after its end.
        first = 0 if self.moment == "export" else max(self.step, _TWO_CHECKPOINTS) if self.kind == DAMAGE else self.step
        while not job.ended:
            phase, step = job.phase()
            writing = self.moment == "checkpoint" and any((job.run_dir / "checkpoints").glob(".partial-step-*"))
            if (step >= first and (writing or phase == self.moment)) or phase == "export":
                return
            time.sleep(0.001)


def intact_checkpoints(run_dir: Path) -> set[Path]:
    """Return the checkpoints whose files match their manifest, checked without the code under test."""
    intact = set()
    for directory in (run_dir / "checkpoints").glob("step-*"):
        with contextlib.suppress(OSError, ValueError):
            files = json.loads((directory / "manifest.json").read_text())["files"]
            if all(size_and_xxh64(directory / name) == tuple(entry) for name, entry in files.items()):
                intact.add(directory)
    return intact


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a file system of 64 MB on `folder` (needs root), and unmount it afterwards."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _damage(path: Path, rng: np.random.Generator) -> None:
    """Invert one byte of a file, or cut it in half."""
    content = bytearray(path.read_bytes())
    if rng.integers(2) or not content:
        content = content[: len(content) // 2]
    else:
        content[int(rng.integers(len(content)))] ^= 0xFF
    with new_file(path) as partial:
        partial.write_bytes(content)


def _send(process: psutil.Process | None, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        if process is not None:
            process.send_signal(number)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _status(process: psutil.Process) -> str:
    try:
        return process.status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE
