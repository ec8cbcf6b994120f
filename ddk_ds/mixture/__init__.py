"""The domain mixture: what to sample next and in which order. Pure functions of numbers; numpy alone."""

from __future__ import annotations

from ddk_ds.mixture.bounds import Bounded
from ddk_ds.mixture.controllers import CONTROLLER_KINDS, Controller, ControllerOptions, make_controller
from ddk_ds.mixture.ddk import DDK, DDKNoSmoothing
from ddk_ds.mixture.decide import Decision, decide
from ddk_ds.mixture.excess_loss import DoReMiOnline, ShearedLlama
from ddk_ds.mixture.exhaustion import EXHAUSTION_POLICIES, Exhaustion, Plan, make_exhaustion
from ddk_ds.mixture.factors import (
    check_perplexities,
    discrepancy,
    initial_factors,
    is_nearly_one_hot,
    one_hot_warning,
    smooth_update,
)
from ddk_ds.mixture.fixed import Scheduled, Static
from ddk_ds.mixture.order import DomainOrder, largest_remainder
from ddk_ds.mixture.schedule import DomainEntry, IntervalState, ids_sha, interval_ids

__all__ = [
    "CONTROLLER_KINDS",
    "DDK",
    "EXHAUSTION_POLICIES",
    "Bounded",
    "Controller",
    "ControllerOptions",
    "DDKNoSmoothing",
    "Decision",
    "DoReMiOnline",
    "DomainEntry",
    "DomainOrder",
    "Exhaustion",
    "IntervalState",
    "Plan",
    "Scheduled",
    "ShearedLlama",
    "Static",
    "check_perplexities",
    "decide",
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
