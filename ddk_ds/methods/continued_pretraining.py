"""Continued pre-training (the paper's CPT): cross-entropy alone."""

from __future__ import annotations

from dataclasses import asdict

import torch

from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.models import Student
from ddk_ds.kernels import KDLoss, linear_kd_loss
from ddk_ds.methods.base import HeadOptions


class ContinuedPretraining:
    """Next-token cross-entropy of the student; no teacher."""

    def __init__(self, options: HeadOptions) -> None:
        self._options = asdict(options)

    def loss(self, student: Student, input_ids: torch.Tensor, labels: torch.Tensor, num_valid: torch.Tensor) -> KDLoss:
        def cross_entropy(hidden: torch.Tensor, head: OutputHead) -> KDLoss:
            return linear_kd_loss(
                hidden,
                head.weight,
                None,
                None,
                labels.flatten(),
                num_valid=num_valid,
                student_bias=head.bias,
                student_form=head.form,
                gamma=0.0,
                **self._options,
            )

        return student(input_ids, cross_entropy)
