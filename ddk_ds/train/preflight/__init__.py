"""Preflight: checks of a run and its machines before it waits in a queue or spends a cluster's time."""

from __future__ import annotations

from ddk_ds.train.preflight.agreement import PlannedRanks, measure_collectives
from ddk_ds.train.preflight.checks import preflight, preflight_machine
from ddk_ds.train.preflight.login_node import check_on_login_node
from ddk_ds.train.preflight.rows import Row, failed
from ddk_ds.train.preflight.sample_counts import domain_samples, same_tokenizers

__all__ = [
    "PlannedRanks",
    "Row",
    "check_on_login_node",
    "domain_samples",
    "failed",
    "measure_collectives",
    "preflight",
    "preflight_machine",
    "same_tokenizers",
]
