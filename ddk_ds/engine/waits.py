"""What of a step a ZeRO-3 engine waits for the other ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils.z3_leaf_module import z3_leaf_module

from ddk_ds.engine.stage_clock import StageClock


def time_gathers(coordinator: Any, clock: StageClock, name: str) -> None:
    """Count the waits of a ZeRO-3 engine for weights that are not there yet. On a GPU a gather that ran ahead, beside
    computation, costs its stream nothing and counts nothing."""
    fetch = coordinator.fetch_sub_module

    def timed(module: Any, forward: bool) -> None:
        if all(one.ds_status == ZeroParamStatus.AVAILABLE for one in module.parameters(recurse=z3_leaf_module(module))):
            fetch(module, forward)
            return
        with clock.waiting(name):
            fetch(module, forward)

    coordinator.fetch_sub_module = timed


def time_reductions(optimizer: Any, clock: StageClock, name: str) -> None:
    """Count what a ZeRO-3 optimizer's reductions of gradients take of the backward pass: on a GPU what is left of them
    when it has ended, on a CPU all."""
    for method in ("reduce_independent_p_g_buckets_and_remove_grads", "independent_gradient_partition_epilogue"):
        setattr(optimizer, method, _waited_for(getattr(optimizer, method), clock, name))


def _waited_for(function: Callable[..., Any], clock: StageClock, name: str) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        with clock.waiting(name):
            return function(*arguments)

    return timed
