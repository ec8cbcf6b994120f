"""A step's line of the ledger."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch

from ddk_ds.engine.profile import utilisation
from ddk_ds.train.step import StepMetrics


def step_numbers(metrics: StepMetrics) -> dict[str, Any]:
    """What was computed: the same again under the same seed. What is not finite is null, which JSON has."""
    numbers = asdict(metrics)
    for name in ("seconds", "peaks", *(() if metrics.method else ("method",))):
        del numbers[name]
    return {name: _finite(value) for name, value in numbers.items()}


def step_clock(metrics: StepMetrics, seconds: dict[str, float], flops: float) -> dict[str, Any]:
    """What depends on the machine: seconds by part, tokens/s, memory in 10^9 bytes, and the MFU.

    `seconds` are those of the step and of what stands outside of its parts; `flops` those of a rank's step. The MFU is
    their share of what the GPU can do at its peak in that time, and null where the peak is not known.
    """
    seconds = {**seconds, **metrics.seconds}
    peaks = {name: round(size / 1e9, 3) for name, size in metrics.peaks.items()}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    mfu = utilisation(flops, seconds["step"], name)
    return {
        **{f"{name}_s": round(value, 4) for name, value in seconds.items()},
        "tokens_per_s": round(sum(metrics.domain_tokens) / seconds["step"], 1),
        "mfu": None if mfu is None else round(mfu, 4),
        "peak_memory_gb": max(peaks.values()),
        "peak_gb": peaks,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
