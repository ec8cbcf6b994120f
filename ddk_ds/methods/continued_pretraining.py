"""Continued pre-training (the paper's CPT): cross-entropy alone."""

from __future__ import annotations

import torch

from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.models import Student
from ddk_ds.kernels import KDLoss, linear_kd_loss


class ContinuedPretraining:
    """Next-token cross-entropy of the student; no teacher."""

    def __init__(self, vocab_size: int, chunk_tokens: int) -> None:
        self._vocab_size = vocab_size
        self._chunk_tokens = chunk_tokens

    def loss(self, student: Student, input_ids: torch.Tensor, labels: torch.Tensor, num_valid: torch.Tensor) -> KDLoss:
        def cross_entropy(hidden: torch.Tensor, head: OutputHead) -> KDLoss:
            return linear_kd_loss(
                hidden,
                head.weight,
                None,
                None,
                labels.flatten(),
                gamma=0.0,
                vocab_size=self._vocab_size,
                num_valid=num_valid,
                student_bias=head.bias,
                chunk_tokens=self._chunk_tokens,
            )

        return student(input_ids, cross_entropy)
