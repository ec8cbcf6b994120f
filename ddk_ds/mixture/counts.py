"""From proportions to whole numbers of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ddk_ds.errors import ConfigError
from ddk_ds.mixture.factors import Vector, check_proportions

Ids = NDArray[np.int64]


def largest_remainder(proportions: Sequence[float] | Vector, total: int) -> Ids:
    """Integer counts (N,) with sum `total` and |count - proportion * total| < 1; ties go to the lower index.

    Raises:
        ConfigError: proportions that are negative, not finite, or do not sum to 1 within 1e-6; total < 0.
    """
    if total < 0:
        raise ConfigError(f"{total} samples an interval: give 0 or more")
    checked = check_proportions(proportions, num_domains=len(proportions), what="proportions")
    # math.fsum is exact: the counts are the same on every machine.
    exact = checked / math.fsum(checked) * total
    counts: Ids = np.floor(exact).astype(np.int64)
    largest_first = np.argsort(counts - exact, kind="stable")
    counts[largest_first[: total - int(counts.sum())]] += 1
    return counts
