"""Shards fetched ahead of their first sample, by one thread on each node."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from ddk_ds.data.cache import CachedStore
from ddk_ds.data.store import Shard
from ddk_ds.errors import UserError

# Of the cache's limit, what may be fetched before it is used: more would evict what is in use.
_AHEAD_SHARE = 0.5


class Prefetcher:
    """Fetches the shards that the training comes to next, in the order of their first use.

    An error is left to the process that comes to read the shard: it reports it in its place.
    """

    def __init__(self, store: CachedStore) -> None:
        self._store = store
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, Shard]] = []
        self._position = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def follow(self, uses: Iterable[tuple[int, Shard]]) -> None:
        """From now on fetch these shards. `uses`: (position of its first sample, shard), positions ascending."""
        with self._changed:
            self._waiting = list(uses)
            self._position = 0
            self._changed.notify()

    def advance(self, position: int) -> None:
        """The training has come to `position`."""
        with self._changed:
            self._position = position
            self._changed.notify()

    def close(self) -> None:
        """End the thread, after the shard that it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (shard := self._next()) is not None:
            try:
                self._store.shard(shard)
            except (UserError, OSError):
                continue

    def _next(self) -> Shard | None:
        """The first shard that is not here and may be fetched now; waits for one, None at the end."""
        limit = self._store.limit_bytes
        with self._changed:
            while not self._closed:
                # What the training has passed was fetched by whoever needed it.
                self._waiting = [use for use in self._waiting if use[0] >= self._position]
                ahead = 0
                for number, (_, shard) in enumerate(self._waiting):
                    ahead += shard.num_bytes
                    if limit is not None and ahead > _AHEAD_SHARE * limit:
                        break
                    if not self._store.holds(shard):
                        return self._waiting.pop(number)[1]
                self._changed.wait()
        return None
