"""How a run is cut short by a signal.

SIGTERM and SIGUSR1 (schedulers' warnings), SIGHUP (the terminal has gone) and the first SIGINT are noted by a handler.
All ranks agree on them at the end of a step, before a domain of an evaluation or tensor of an export; the run then
saves and ends with `EXIT_INTERRUPTED`. A second SIGINT ends it at once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch

from ddk_ds.comm import Comm

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# A launcher that got the terminal's SIGINT too passes it on at once (torchrun): not a second Ctrl-C.
_SAME_SIGINT_S = 1.0


class Interrupted(Exception):
    """A signal came to some rank; raised at the same place on every rank. The message names the signal."""


class Interruption:
    """Notes the signals of this process and lets all ranks agree on them."""

    def __init__(self, comm: Comm, device: torch.device) -> None:
        self._comm = comm
        self._device = device
        self.signal = 0
        """Number of the first signal that came to this process; 0 if none came. A launcher sends another after it."""
        self._sigint_at: float | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals until the end of the block. Must be called in the main thread."""
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # under nohup
        before = {number: signal.signal(number, self._note) for number in _SIGNALS if number not in ignored}
        try:
            yield
        finally:
            for number, handler in before.items():
                # Under the default handler a late signal would kill a run that has saved or finished, which loses its
                # exit code: a scheduler's warning, or that of a launcher that has gone.
                late = number != signal.SIGINT and handler == signal.SIG_DFL
                signal.signal(number, signal.SIG_IGN if late else handler)

    def check(self) -> None:
        """Raise Interrupted on every rank if a signal came to any rank. Collective."""
        raise_for(self._comm.all_reduce_sum(torch.tensor(self.noted(), device=self._device)).tolist())

    def noted(self) -> list[float]:
        """Return this process's signal for `raise_for`, to be summed over the ranks: its place among the signals."""
        return [float(number == self.signal) for number in _SIGNALS]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._sigint_at is not None and now - self._sigint_at > _SAME_SIGINT_S:
                signal.default_int_handler(number, frame)
            self._sigint_at = self._sigint_at or now
        self.signal = self.signal or number


def raise_for(noted: Sequence[float]) -> None:
    """Raise Interrupted, with the signal of the highest number, if the sums of all ranks' `noted` have any."""
    came = [number for number, ranks in zip(_SIGNALS, noted, strict=True) if ranks]
    if came:
        raise Interrupted(signal.Signals(max(came)).name)
