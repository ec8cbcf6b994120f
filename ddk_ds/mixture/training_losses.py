"""What training has measured of the domains, in place of held-out samples (`mixture.source: training`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ddk_ds.mixture.domain_vectors import Vector

Means = Sequence[Sequence[float | None]]
"""(2, N) mean cross-entropy and mean divergence of a domain's tokens, in nats; None for a domain never drawn."""


def interval_means(sums: Sequence[Sequence[float]], last: Means) -> list[list[float | None]]:
    """Return the means (2, N) of an interval's tokens; a domain without a token keeps its `last` values.

    Args:
        sums: (3, N) tokens, and the sums of their cross-entropies and divergences.
        last: the means of the interval before; empty before the first.
    """
    tokens, *totals = sums
    before = last or [[None] * len(tokens)] * 2
    return [
        [total / count if count else old for total, count, old in zip(row, tokens, of_row, strict=True)]
        for row, of_row in zip(totals, before, strict=True)
    ]


def filled(means: Means, held_out: Vector) -> tuple[Vector, Vector]:
    """Return losses and divergences (N,) in nats, with values for domains that were never drawn.

    Those have their `held_out` (N,) loss, and the mean divergence of the others.
    """
    losses, divergences = (np.array([np.nan if one is None else one for one in row]) for row in means)
    unknown = np.isnan(losses)
    mean = divergences[~unknown].mean() if not unknown.all() else np.nan
    return np.where(unknown, held_out, losses), np.where(unknown, mean, divergences)
