"""Function for every rank of test_guard.py: a run whose loss is NaN on one rank at given steps."""

from __future__ import annotations

import signal
from typing import Any

import torch

from ddk_ds.engine.runtime import Runtime
from ddk_ds.train.guard import NumbersGoneWrong
from ddk_ds.train.interruption import Interrupted
from ddk_ds.train.loop import train
from tests.dist.resume_worker import BreakOff, prepare


class Poisoned:
    """A method whose loss is NaN on the samples of certain steps."""

    def __init__(self, method: Any, run: Any, steps: list[int]) -> None:
        self._method, self._run, self._steps = method, run, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def loss(self, *arguments: Any) -> Any:
        """Return the loss of the method, or NaN with the same graph."""
        result = self._method.loss(*arguments)
        poisoned = self._run.state.position // 8 + 1 in self._steps
        return result._replace(loss=result.loss * torch.nan) if poisoned else result


def poison(
    runtime: Runtime,
    config_path: str,
    name: str,
    steps: list[int],
    lines: int | None = None,
    signal_after: int | None = None,
) -> str:
    """Train, break off after that many lines of the ledger, or interrupt after a step; return how the run ended."""
    run = prepare(runtime, config_path, name, lines)
    if signal_after is not None:
        _signal_after(run, signal_after)
    if runtime.comm.rank == 1:
        make = run.make_method
        run.make_method = lambda: Poisoned(make(), run, steps)  # type: ignore[method-assign,assignment,return-value]
    try:
        train(run)
    except NumbersGoneWrong as wrong:
        return str(wrong)
    except BreakOff:
        return "broken off"
    except Interrupted:
        return "interrupted"
    return "finished"


def _signal_after(run: Any, step: int) -> None:
    write = run.ledger.write

    def signalled(record: dict[str, Any]) -> None:
        write(record)
        if record["kind"] == "step" and record["step"] == step - 1:  # agreed on at the end of the step after it
            run.interruption.signal = signal.SIGTERM

    run.ledger.write = signalled
