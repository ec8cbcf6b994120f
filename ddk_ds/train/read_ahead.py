"""What a node fetches before the training asks for it, and what a rank does when it cannot read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from ddk_ds.comm import Comm, agree
from ddk_ds.data.cache import CachedStore, Prefetcher
from ddk_ds.data.loader import MicroBatch, MixtureDataset
from ddk_ds.data.store import Store
from ddk_ds.errors import UserError
from ddk_ds.mixture.interval_state import IntervalState
from ddk_ds.mixture.order import DomainOrder
from ddk_ds.train.interruption import Interruption, raise_for


class ReadAhead:
    """Tells a node's prefetcher what comes next; does nothing where the data is read in place."""

    def __init__(self, store: Store, dataset: MixtureDataset, orders: Sequence[DomainOrder], *, enabled: bool) -> None:
        """`enabled`: on one rank of each node."""
        self._prefetcher = Prefetcher(store) if enabled and isinstance(store, CachedStore) else None
        self._dataset = dataset
        self._orders = orders
        self._begin = 0

    def border(self, state: IntervalState, interval_samples: int) -> None:
        """The models are evaluated now: what each domain yields next does not depend on the proportions to come."""
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
        """An interval of these global sample ids is trained on from `consumed` on."""
        self._begin = consumed
        if self._prefetcher is not None:
            self._prefetcher.follow(self._dataset.first_uses(ids[consumed:]))

    def advance(self, consumed: int) -> None:
        """So many samples of the interval are trained on."""
        if self._prefetcher is not None:
            self._prefetcher.advance(consumed - self._begin)

    def close(self) -> None:
        """The training is over."""
        if self._prefetcher is not None:
            self._prefetcher.close()


def read_steps(
    batches: Iterator[MicroBatch], micro_batches: int, comm: Comm, interruption: Interruption
) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each optimizer step. Collective.

    Raises:
        UserError: what any rank failed of, on all of them: none is left waiting in a forward pass.
        Interrupted: a signal came to any rank.
    """
    while True:
        taken: list[MicroBatch] = []
        failure: UserError | None = None
        try:
            taken = list(islice(batches, micro_batches))
        except UserError as error:
            failure = error
        # Two numbers a step; an error itself travels only where there is one.
        failed, signal = interruption.highest(failure is not None)
        if failed:
            agree(comm, failure)
        raise_for(signal)
        if not taken:
            return
        yield taken
