"""The plan of a teacher's cache: time to fill it, time that a run saves, and the runs from which it pays. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ddk_ds.config import Config
from ddk_ds.data.teacher_samples import bytes_a_token
from ddk_ds.engine.flops import RunFlops
from ddk_ds.planner.plan_inputs import PlannedData


@dataclass(frozen=True)
class CachePlan:
    """The cache of a run's teacher, at the run's MFU."""

    num_bytes: float
    """The most that it takes, if every token of the run is another one."""
    fill_hours: float
    """Time of the teacher for the run's tokens, which is also what a run saves that finds them there."""
    fill_all_hours: float
    """Time of the teacher for all of the data."""
    runs_until_all_pays: int
    """The least number of runs on it with which filling it with all of the data takes less time than their teachers."""
    read_bytes_per_s: float
    """The most that all nodes together read of it, in a run that computes no teacher."""


def plan_cache(
    config: Config, data: PlannedData, flops: RunFlops, tokens: int, flop_per_s: float, vocab_size: int
) -> CachePlan | None:
    """Plan the cache of a run of so many tokens; None without a cache.

    Args:
        flop_per_s: model FLOPs that the cluster computes each second.
    """
    section = None if config.teacher is None else config.teacher.cache
    if section is None or flops.kd is None:
        return None
    of_token = bytes_a_token(section.keep, section.tokens, vocab_size)
    fill_hours = (flops.kd - flops.cpt) / flop_per_s / 3600
    all_over_run = data.shard_bytes / data.token_bytes / tokens
    return CachePlan(
        num_bytes=tokens * of_token,
        fill_hours=fill_hours,
        fill_all_hours=fill_hours * all_over_run,
        runs_until_all_pays=math.floor(all_over_run) + 1,
        read_bytes_per_s=flop_per_s * tokens / flops.cpt * of_token,
    )
