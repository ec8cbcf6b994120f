"""The protocol that every method keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ddk_ds.engine.models import Student
from ddk_ds.kernels import KDLoss, LogitsDtype


@dataclass(frozen=True)
class HeadOptions:
    """What every use of the output heads in a run has in common; the names are those of `kernels.Options`."""

    vocab_size: int
    chunk_tokens: int
    logits_dtype: LogitsDtype = "float32"


class Method(Protocol):
    """Loss of a micro-batch."""

    def loss(self, student: Student, input_ids: torch.Tensor, labels: torch.Tensor, num_valid: torch.Tensor) -> KDLoss:
        """Sums over this micro-batch's valid tokens, divided by `num_valid`.

        input_ids (B, L) int64; labels (B, L) int64, ignored where IGNORE_INDEX; num_valid: scalar, the valid tokens of
        the whole optimizer step over ranks and micro-batches. Runs through the student's engine: a collective.
        """
