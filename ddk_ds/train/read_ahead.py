"""The shards that a node fetches before the training reads them, where the data is remote."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ddk_ds.data.cache import CachedStore, Prefetcher
from ddk_ds.data.loader import MixtureDataset
from ddk_ds.data.store import Store
from ddk_ds.mixture.interval_state import IntervalState
from ddk_ds.mixture.order import DomainOrder


class ReadAhead:
    """Tells a node's prefetcher which samples come next; does nothing if the data is local."""

    def __init__(self, store: Store, dataset: MixtureDataset, orders: Sequence[DomainOrder], *, enabled: bool) -> None:
        """Start the prefetcher if `store` is a cache and `enabled` is True, which it is on one rank of each node."""
        self._prefetcher = Prefetcher(store) if enabled and isinstance(store, CachedStore) else None
        self._dataset = dataset
        self._orders = orders
        self._begin = 0

    def border(self, state: IntervalState, interval_samples: int) -> None:
        """Fetch the shards of each domain's next samples while the models are evaluated.

        A domain's next samples do not depend on the proportions that the evaluation decides: each domain gets an equal
        part of the next interval's `interval_samples`.
        """
        if self._prefetcher is None:
            return
        draws = -(-interval_samples // len(self._orders))
        begins = [cursor + count for cursor, count in zip(state.cursors, state.counts or state.cursors, strict=True)]
        by_domain = [
            offset + order.take(begin, begin + draws)
            for order, offset, begin in zip(self._orders, self._dataset.sample_offsets, begins, strict=True)
        ]
        self._prefetcher.follow(self._dataset.first_uses(np.stack(by_domain, 1).ravel()))

    def interval(self, ids: npt.NDArray[np.int64], consumed: int) -> None:
        """Fetch the shards of an interval's samples `ids` (n,), global ids, after the first `consumed`.

        The first `consumed` samples have been trained on before.
        """
        self._begin = consumed
        if self._prefetcher is not None:
            self._prefetcher.follow(self._dataset.first_uses(ids[consumed:]))

    def advance(self, consumed: int) -> None:
        """Note that the first `consumed` samples of the interval have been trained on."""
        if self._prefetcher is not None:
            self._prefetcher.advance(consumed - self._begin)

    def close(self) -> None:
        """End the prefetcher's thread, at the end of the training."""
        if self._prefetcher is not None:
            self._prefetcher.close()
