"""What a cache has of a sample, as the numpy arrays that were given to it."""

from __future__ import annotations

import numpy as np

from ddk_ds.data.teacher_samples import Counted, Drawn, DrawnTokens, Likeliest, LikeliestTokens, Record, Said


def said_of(coding: DrawnTokens | LikeliestTokens, record: Record, length: int) -> Said:
    """Return what was said of a sample of `length` positions."""
    found = coding.unpacked([record], length, lambda tensor: tensor)
    labels = np.frombuffer(memoryview(record)[16 : 16 + 8 * length], "<f4")[length:].copy()
    arrays = [part.numpy() for part in found]
    if not isinstance(found, Counted):
        return Likeliest(*arrays, labels)
    rows = [np.repeat(ids, counts) for ids, counts in zip(arrays[0], arrays[1], strict=True)]
    return Drawn(np.stack(rows), arrays[2], labels)
