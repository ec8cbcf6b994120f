"""No wait without an end: a phase that outlives its limit writes every thread's stack and ends the process.

faulthandler's own thread does it, which needs neither the interpreter's lock nor an answer from the GPU. The launcher
(or srun) ends the other ranks when one is gone.
"""

from __future__ import annotations

import faulthandler
from pathlib import Path
from typing import Literal

from ddk_ds.config import Limits

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
