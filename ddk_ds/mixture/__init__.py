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
from ddk_ds.mixture.counts import largest_remainder
from ddk_ds.mixture.exhaustion import EXHAUSTION_POLICIES, Exhaustion, Plan, make_exhaustion
from ddk_ds.mixture.factors import (
    check_perplexities,
    discrepancy,
    initial_factors,
    is_nearly_one_hot,
    one_hot_warning,
    smooth_update,
)
from ddk_ds.mixture.order import DomainOrder
from ddk_ds.mixture.schedule import DomainEntry, IntervalState, ids_sha, interval_ids

__all__ = [
    "CONTROLLER_KINDS",
    "DDK",
    "EXHAUSTION_POLICIES",
    "Controller",
    "DDKNoSmoothing",
    "DomainEntry",
    "DomainOrder",
    "Exhaustion",
    "IntervalState",
    "Plan",
    "Static",
    "check_perplexities",
    "discrepancy",
    "ids_sha",
    "initial_factors",
    "interval_ids",
    "is_nearly_one_hot",
    "largest_remainder",
    "make_controller",
    "make_exhaustion",
    "one_hot_warning",
    "smooth_update",
]
