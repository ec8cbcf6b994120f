"""Eq. 3: cross-entropy plus gamma times the divergence from a frozen teacher."""

from __future__ import annotations

import torch

from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.models import Student, Teacher
from ddk_ds.kernels import KDLoss, linear_kd_loss


class Distillation:
    """CE + gamma * T^2 * KL(teacher || student); which domains it sees is the mixture's affair."""

    def __init__(self, teacher: Teacher, vocab_size: int, gamma: float, temperature: float, chunk_tokens: int) -> None:
        self._teacher = teacher
        self._vocab_size = vocab_size
        self._gamma = gamma
        self._temperature = temperature
        self._chunk_tokens = chunk_tokens

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
                    gamma=self._gamma,
                    temperature=self._temperature,
                    vocab_size=self._vocab_size,
                    num_valid=num_valid,
                    student_bias=head.bias,
                    teacher_bias=teacher_head.bias,
                    chunk_tokens=self._chunk_tokens,
                )

        return student(input_ids, distil)
