"""Signals that ask a run to end: noted when they come, agreed on by all ranks where the run can be cut.

SIGTERM and SIGUSR1 (schedulers' warnings) and the first SIGINT are asked for together at the next step, domain of an
evaluation or tensor of an export; the run then saves and ends with `EXIT_INTERRUPTED`. A second SIGINT ends it at once.

No wait without an end: a phase that outlives its limit writes every thread's stack and ends the process.

faulthandler's own thread does it, which needs neither the interpreter's lock nor an answer from the GPU. The launcher
(or srun) ends the other ranks when one is gone.
"""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal

import torch

from ddk_ds.comm import Comm
from ddk_ds.config import Limits

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(Exception):
    """All ranks have left what they did at the same place. The message names the signal."""


class Interruption:
    """What this process was asked, and a way for all to agree on it."""

    def __init__(self, comm: Comm, device: torch.device) -> None:
        self._comm = comm
        self._device = device
        self.signal = 0
        """Number of the signal that came; 0: none."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the signals until the end of the block. In the main thread."""
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                # Left to its default, a late warning would kill a run that has done its work.
                late = number == signal.SIGUSR1 and handler == signal.SIG_DFL
                signal.signal(number, signal.SIG_IGN if late else handler)

    def check(self) -> None:
        """Raise Interrupted on every rank if a signal came to any. Collective."""
        raise_for(self.highest(False)[1])

    def highest(self, flag: bool) -> tuple[bool, int]:
        """Whether any rank's `flag` is set, and the highest number of a signal that came to any. Collective."""
        numbers = torch.tensor([float(flag), float(self.signal)], device=self._device)
        flagged, number = self._comm.all_reduce_max(numbers).tolist()
        return bool(flagged), int(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.signal = number


def raise_for(number: int) -> None:
    """Raise Interrupted if `number` is a signal's, the highest that came to any rank."""
    if number:
        raise Interrupted(signal.Signals(number).name)


Phase = Literal["step", "evaluation", "controller", "checkpoint", "export"]


class Watchdog:
    """One rank's: `<run>/stacks/rank-<n>.txt` holds the phase that it is in, and the stacks where that took too long.

    Stacks of an earlier start are kept beside it.
    """

    def __init__(self, run_dir: Path, rank: int, limits: Limits) -> None:
        self._limits = limits
        path = run_dir / "stacks" / f"rank-{rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and "Timeout" in path.read_text(errors="replace"):
            path.rename(path.with_name(f"{path.stem}-{int(path.stat().st_mtime)}.txt"))
        self._stream = path.open("w")

    def watch(self, phase: Phase, step: int) -> None:
        """A phase begins, and the one before it has ended."""
        limit = getattr(self._limits, f"{'evaluation' if phase == 'controller' else phase}_s")
        self._stream.seek(0)
        self._stream.truncate()
        self._stream.write(f"{phase} after step {step}, at most {limit:g} s\n")
        self._stream.flush()
        if limit:
            faulthandler.dump_traceback_later(limit, exit=True, file=self._stream)
        else:
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Nothing is watched any more."""
        faulthandler.cancel_dump_traceback_later()
        self._stream.close()
