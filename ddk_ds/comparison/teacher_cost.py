"""The cost of the teacher in runs side by side: paid, without its cache, and the cache's weight on the disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddk_ds.comparison.method_stages import changed_says
from ddk_ds.config import Config, Data
from ddk_ds.data.teacher_cache import open_stored
from ddk_ds.data.teacher_place import open_place
from ddk_ds.errors import UserError


@dataclass(frozen=True)
class TeacherCost:
    """The teacher's part of one run, by its ledger; measurements on held-out samples are not in it."""

    config: Config
    asked: int
    """Samples that the loss compares with the teacher."""
    taught: int | None
    """Samples that went through the teacher; None if an older version wrote the ledger."""
    seconds: float
    """Seconds of its passes on rank 0, and of waiting for its weights."""
    flops_per_sample: float | None
    """FLOPs of its forward pass; None where its files are gone."""

    @property
    def cache(self) -> str | None:
        """Return the directory of the run's cache, or None."""
        assert self.config.teacher is not None
        return None if self.config.teacher.cache is None else self.config.teacher.cache.path


def teacher_cost(config: Config, steps: Sequence[Mapping[str, Any]], flops_per_token: float | None) -> TeacherCost:
    """Read the cost of a run's teacher off the lines of its steps; the run has one."""
    assert config.teacher is not None
    asked = len(steps) * config.train.global_batch_samples
    if not (config.distils or config.preset.always_runs_teacher):
        asked = 0
    clocks = [line["clock"] for line in steps]
    counts = [clock.get("teacher_samples") for clock in clocks] if config.teacher.cache is not None else [asked]
    return TeacherCost(
        config=config,
        asked=asked,
        taught=None if None in counts else int(sum(count for count in counts if count is not None)),
        seconds=math.fsum(clock.get(key, 0.0) for clock in clocks for key in ("teacher_s", "teacher_gather_s")),
        flops_per_sample=None if flops_per_token is None else flops_per_token * config.data.sequence_length,
    )


def teacher_costs(costs: Mapping[str, Sequence[TeacherCost]]) -> dict[str, Any] | None:
    """Return the sums over the runs of each label, and each cache's weight; None if no run has a cache.

    `costs` has no entry for a label without a teacher.
    """
    everything = [cost for runs in costs.values() for cost in runs]
    caches = {cost.cache: cost.config.data for cost in everything if cost.cache is not None}
    if not caches:
        return None
    of_caches = [cost for cost in everything if cost.cache is not None]
    return {
        "methods": {label: _sums(runs) for label, runs in costs.items()},
        "on_caches": _sums(of_caches),
        "caches": [_weight(path, data) for path, data in caches.items()],
    }


def teacher_remarks(costs: Mapping[str, Sequence[TeacherCost]]) -> list[str]:
    """Return a sentence for each label that computed its teacher while other runs read a cache of it."""
    cached = next((cost.config for runs in costs.values() for cost in runs if cost.cache is not None), None)
    remarks = []
    for label, runs in costs.items():
        live = next((cost.config for cost in runs if cost.cache is None), None)
        if cached is None or live is None:
            continue
        assert cached.teacher is not None and cached.teacher.cache is not None
        reason = (
            ", ".join(live.beyond_cache(cached.teacher.cache.keep))
            or changed_says(live, cached)
            or "its configuration has no cache"
        )
        remarks.append(f"{label} learnt from the teacher itself, other runs from a cache: {reason}")
    return remarks


def _sums(runs: Sequence[TeacherCost]) -> dict[str, Any]:
    def total(values: Sequence[float | None]) -> float | None:
        return None if None in values else math.fsum(value for value in values if value is not None)

    paid = [
        None if cost.taught is None or cost.flops_per_sample is None else cost.taught * cost.flops_per_sample
        for cost in runs
    ]
    without = [None if cost.flops_per_sample is None else cost.asked * cost.flops_per_sample for cost in runs]
    counts = [cost.taught for cost in runs]
    return {
        "cached": sum(cost.cache is not None for cost in runs),
        "runs": len(runs),
        "asked": sum(cost.asked for cost in runs),
        "taught": None if None in counts else sum(count for count in counts if count is not None),
        "flops": total(paid),
        "flops_without": total(without),
        "seconds": math.fsum(cost.seconds for cost in runs),
    }


def _weight(path: str, data: Data) -> dict[str, Any]:
    """Return the samples and bytes of a cache, None where it can't be read: it may have been deleted since."""
    try:
        cache = open_stored(open_place(path, data))
    except UserError:
        return {"path": path, "samples": None, "bytes": None}
    samples = {domain: len(cache.known(domain)) for domain in cache.domains}
    return {"path": path, "samples": samples, "bytes": cache.num_bytes}
