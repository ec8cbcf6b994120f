"""The shards that a node fetches before the training reads them, where data or teacher's cache are remote."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ddk_ds.data.cache import AHEAD_SHARE, CachedStore, Prefetcher
from ddk_ds.data.loader import MixtureDataset
from ddk_ds.data.store import Store
from ddk_ds.data.teacher_cache import TeacherCache
from ddk_ds.mixture.interval_state import IntervalState
from ddk_ds.mixture.order import DomainOrder


class ReadAhead:
    """Tells a node's prefetchers which samples come next; does nothing for what is local: data, or teacher's cache."""

    def __init__(
        self,
        store: Store,
        dataset: MixtureDataset,
        orders: Sequence[DomainOrder],
        teacher: TeacherCache | None = None,
        *,
        enabled: bool,
    ) -> None:
        """Start a prefetcher of what is remote if `enabled` is True, which it is on one rank of each node."""
        of_teacher = None if teacher is None else teacher.place.store
        share = AHEAD_SHARE / 2 if isinstance(of_teacher, CachedStore) else AHEAD_SHARE
        self._prefetcher = Prefetcher(store, share) if enabled and isinstance(store, CachedStore) else None
        self._of_teacher = Prefetcher(of_teacher, share) if enabled and isinstance(of_teacher, CachedStore) else None
        self._teacher = teacher
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
        if self._of_teacher is not None and self._teacher is not None:
            self._of_teacher.follow(self._teacher.first_uses(self._dataset.by_domain(ids[consumed:])))

    def advance(self, consumed: int) -> None:
        """Note that the first `consumed` samples of the interval have been trained on."""
        for prefetcher in self._prefetchers:
            prefetcher.advance(consumed - self._begin)

    def close(self) -> None:
        """End the prefetchers' threads, at the end of the training."""
        for prefetcher in self._prefetchers:
            prefetcher.close()

    @property
    def _prefetchers(self) -> list[Prefetcher]:
        return [prefetcher for prefetcher in (self._prefetcher, self._of_teacher) if prefetcher is not None]
