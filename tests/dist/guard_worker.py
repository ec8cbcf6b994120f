"""Runs on every rank of test_guard.py: a run whose loss is NaN on one rank at given steps."""

from __future__ import annotations

from typing import Any

import torch

from ddk_ds.config import load_config
from ddk_ds.engine.runtime import Runtime
from ddk_ds.train.guard import NumbersGoneWrong
from ddk_ds.train.inputs import check_inputs
from ddk_ds.train.interruption import Interruption
from ddk_ds.train.loop import train
from ddk_ds.train.run_dir import claim_run_dir, run_identity
from ddk_ds.train.setup import prepare_run


class Poisoned:
    """A method whose loss is NaN at some steps."""

    def __init__(self, method: Any, run: Any, steps: list[int]) -> None:
        self._method, self._run, self._steps = method, run, steps

    def loss(self, *arguments: Any) -> Any:
        """The method's own, or NaN with its graph."""
        result = self._method.loss(*arguments)
        poisoned = self._run.state.step + 1 in self._steps
        return result._replace(loss=result.loss * torch.nan) if poisoned else result


def poison(runtime: Runtime, config_path: str, name: str, steps: list[int]) -> str:
    """Train; what the run ended with, and whether the weights moved at the poisoned steps."""
    config = load_config(config_path, [f"name={name}"])
    inputs = check_inputs(config, runtime.comm)
    if runtime.comm.rank == 0:
        claim_run_dir(config, run_identity(config, inputs.fingerprints))
    runtime.comm.barrier()
    run = prepare_run(config, inputs, runtime, Interruption(runtime.comm, runtime.device))
    if runtime.comm.rank == 1:
        make = run.make_method
        run.make_method = lambda: Poisoned(make(), run, steps)  # type: ignore[method-assign,assignment,return-value]
    try:
        train(run)
    except NumbersGoneWrong as wrong:
        return str(wrong)
    return "finished"
