"""Continued pre-training (the paper's CPT): cross-entropy alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from ddk_ds.engine.models import Student
from ddk_ds.kernels import KDLoss
from ddk_ds.methods.base import Batch, HeadOptions, Stateless, cross_entropy


class ContinuedPretraining(Stateless):
    """Next-token cross-entropy of the student; no teacher."""

    def __init__(self, options: HeadOptions) -> None:
        self._options = options

    def taught(self, batches: Sequence[Batch]) -> AbstractContextManager[Sequence[None]]:
        """Nothing."""
        return nullcontext([None] * len(batches))

    def loss(self, student: Student, batch: Batch, taught: None) -> KDLoss:
        """See `Method`."""
        return student(batch.input_ids, lambda hidden, head: cross_entropy(hidden, head, batch, self._options))
