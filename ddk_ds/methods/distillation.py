"""Eq. 3: cross-entropy plus gamma times the divergence from a frozen teacher."""

from __future__ import annotations

from dataclasses import asdict

import torch

from ddk_ds.config import Loss
from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.models import Student, Teacher
from ddk_ds.kernels import KDLoss, linear_kd_loss
from ddk_ds.methods.base import HeadOptions


class Distillation:
    """CE + gamma * T^2 * D(teacher, student); which domains it sees is the mixture's affair."""

    def __init__(self, teacher: Teacher, loss: Loss, options: HeadOptions) -> None:
        self._teacher = teacher
        chosen = loss.model_dump(include={"gamma", "temperature", "divergence", "coefficient"})
        self._options = {**chosen, **asdict(options)}

    def loss(self, student: Student, input_ids: torch.Tensor, labels: torch.Tensor, num_valid: torch.Tensor) -> KDLoss:
        teacher_hidden = self._teacher.hidden(input_ids)

        def distil(hidden: torch.Tensor, head: OutputHead) -> KDLoss:
            with self._teacher.head.gathered() as teacher_head:
                return linear_kd_loss(
                    hidden,
                    head.weight,
                    teacher_hidden,
                    teacher_head.weight,
                    labels.flatten(),
                    num_valid=num_valid,
                    student_bias=head.bias,
                    teacher_bias=teacher_head.bias,
                    student_form=head.form,
                    teacher_form=teacher_head.form,
                    **self._options,
                )

        return student(input_ids, distil)
