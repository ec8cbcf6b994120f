"""The time limits of a rank's phases, from its first lines to its end.

Beyond its limit a phase writes the stack of every thread and ends the process. The ranks begin a phase at about the
same time, so those that wait for one another are beyond it together: each stays for a few seconds more, in which the
one that hangs writes its stacks too. The launcher (or srun) then ends what is left.

If a thread of Python cannot do this, since another one holds the interpreter's lock, faulthandler's own thread does it.
"""

from __future__ import annotations

import faulthandler
import os
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryFile
from threading import Thread
from typing import Literal

from ddk_ds.config import Limits

Phase = Literal["start", "models", "restore", "evaluation", "controller", "step", "checkpoint", "export", "end"]
_KEYS: dict[Phase, str] = {
    "start": "start_s",
    "models": "start_s",
    "restore": "checkpoint_s",
    "evaluation": "evaluation_s",
    "controller": "evaluation_s",
    "step": "step_s",
    "checkpoint": "checkpoint_s",
    "export": "export_s",
    "end": "step_s",
}
# A rank can leave these while another one, with a slower disk, is still in them; the others end in a collective.
_LEFT_ALONE: tuple[Phase, ...] = ("models", "restore", "checkpoint", "export")
# Seconds between the stacks and the end of the process, which makes the launcher end the other ranks of its node.
_LEAD_S = 15.0
_LOOK_EVERY_S = 0.5


class Watchdog:
    """Limits the time of each phase of one rank, until the process has ended.

    `<run>/stacks/rank-<n>.txt` names the phase that the rank is in, and holds the stacks if that exceeded its limit. Of
    many steps in a row it names the first, except on rank 0 and where there are stacks.
    Before there is that directory, the stacks go to the standard error.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._phase: Phase = "start"
        self._key, self._limit, self._where = "start_s", 0.0, ""
        self._deadline = float("inf")
        self._file = 2
        self._path: Path | None = None
        self._rank = 0
        self._written: tuple[Phase, str] | None = None
        self.watch("start")
        Thread(target=self._look, name="watchdog", daemon=True).start()

    def write_to(self, run_dir: Path, rank: int) -> None:
        """Write to this run's directory from now on. Stacks of an earlier start are kept next to it."""
        path = run_dir / "stacks" / f"rank-{rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and "Timeout" in path.read_text(errors="replace"):
            path.rename(path.with_name(f"{path.stem}-{int(path.stat().st_mtime)}.txt"))
        self._file, self._path = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), path
        self._rank, self._written = rank, None

    def watch(self, phase: Phase, step: int = 0) -> None:
        """End the phase before and begin `phase` with its time limit; a limit of 0 s means no limit."""
        key = _KEYS[phase]
        limit = float(getattr(self._limits, key)) or float("inf")
        deadline = time.monotonic() + limit
        if self._phase in _LEFT_ALONE and phase != self._phase and self._deadline > deadline:
            key, limit, deadline = self._key, self._limit, self._deadline
        self._phase, self._key, self._limit, self._deadline = phase, key, limit, deadline
        self._where = f"{phase} after step {step}, at most {limit:g} s"
        # `ddk status` reads the step in rank 0's file. The others, on the same disk, need not change at each step.
        if self._rank == 0 or (phase, key) != self._written:
            self._written = phase, key
            self._write_where()
        if deadline == float("inf"):
            faulthandler.cancel_dump_traceback_later()
        else:
            late_s = deadline - time.monotonic() + 2 * _LEAD_S
            faulthandler.dump_traceback_later(late_s, exit=True, file=self._file)

    def _write_where(self) -> None:
        with suppress(OSError):  # a full disk must not end the run
            if self._path is not None:
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, f"{self._where}\n".encode(), 0)
                os.lseek(self._file, 0, os.SEEK_END)

    def _look(self) -> None:
        while time.monotonic() <= self._deadline:
            time.sleep(_LOOK_EVERY_S)
        line = (
            f"rank {os.environ.get('RANK', '0')}: {self._where}: not done; the run ends. limits.{self._key} sets the "
            f"time; stacks: {self._path or 'below'}\n"
        )
        with TemporaryFile() as stacks:
            faulthandler.dump_traceback(file=stacks)
            stacks.seek(0)
            text = f"Timeout ({timedelta(seconds=self._limit)})!\n".encode() + stacks.read()
        # A thread of its own: the disk may be what does not answer.
        Thread(target=self._report, args=(line.encode(), text), daemon=True).start()
        time.sleep(min(_LEAD_S, self._limit))
        os._exit(1)

    def _report(self, line: bytes, stacks: bytes) -> None:
        with suppress(OSError):
            os.write(2, line)
        self._write_where()  # the step of this moment
        with suppress(OSError):
            os.write(self._file, stacks)
