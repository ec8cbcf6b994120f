"""The micro-batches of an interval's steps: a step's are read while the device computes the step before."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from ddk_ds.comm import Comm, raise_together
from ddk_ds.data.loader import MicroBatch
from ddk_ds.errors import UserError
from ddk_ds.train.interruption import Interruption, raise_for


class StepReader:
    """Reads each step's micro-batches; all ranks agree on whether they could, and on signals.

    They agree by numbers that each step reduces anyway; only the first step of an interval needs a reduction for them.
    """

    def __init__(self, batches: Iterator[MicroBatch], micro_batches: int, interruption: Interruption) -> None:
        """Take this rank's `batches` of the interval, and the number of `micro_batches` of a step on a rank."""
        self._batches, self._micro_batches = batches, micro_batches
        self._interruption = interruption
        self._read: list[MicroBatch] = []
        self._failure: UserError | None = None
        self._seconds = 0.0

    def first(self, comm: Comm, device: torch.device) -> list[MicroBatch]:
        """Read the interval's first step and return it, as `agreed` does. Collective."""
        numbers = torch.tensor(self.read(), dtype=torch.float64, device=device)
        return self.agreed(comm, comm.all_reduce_sum(numbers).tolist())

    def read(self) -> list[float]:
        """Read this rank's micro-batches of the next step; return numbers for `agreed`, to be summed over the ranks."""
        started = time.perf_counter()
        try:
            self._read = list(islice(self._batches, self._micro_batches))
        except UserError as error:
            self._failure = error
        self._seconds += time.perf_counter() - started
        return [float(self._failure is not None), *self._interruption.noted()]

    def agreed(self, comm: Comm, sums: Sequence[float]) -> list[MicroBatch]:
        """Return this rank's micro-batches of the next step; [] at the end of the interval. Collective.

        Raises:
            UserError: a rank cannot read its samples. Every rank raises it, so that none waits in a forward pass.
            Interrupted: a signal came to a rank.
        """
        failed, *noted = sums
        raise_for(noted)  # what is done is saved, also while a store fails
        if failed:  # an error itself is sent only if a rank has one
            raise_together(comm, self._failure)
        return self._read

    def take_seconds(self) -> float:
        """Return the seconds of reading since the last call."""
        taken, self._seconds = self._seconds, 0.0
        return taken
