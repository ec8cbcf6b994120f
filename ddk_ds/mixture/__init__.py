"""The domain mixture: what to sample next and in which order. Pure functions of numbers; numpy alone."""

from __future__ import annotations

from ddk_ds.mixture.controllers import (
    CONTROLLER_KINDS,
    DDK,
    Controller,
    DDKNoSmoothing,
    Static,
    make_controller,
)
from ddk_ds.mixture.factors import (
    check_perplexities,
    discrepancy,
    initial_factors,
    is_nearly_one_hot,
    one_hot_warning,
    smooth_update,
)
from ddk_ds.mixture.schedule import (
    DomainEntry,
    DomainOrder,
    IntervalState,
    ids_sha,
    interval_ids,
    largest_remainder,
)

__all__ = [
    "CONTROLLER_KINDS",
    "DDK",
    "Controller",
    "DDKNoSmoothing",
    "DomainEntry",
    "DomainOrder",
    "IntervalState",
    "Static",
    "check_perplexities",
    "discrepancy",
    "ids_sha",
    "initial_factors",
    "interval_ids",
    "is_nearly_one_hot",
    "largest_remainder",
    "make_controller",
    "one_hot_warning",
    "smooth_update",
]
