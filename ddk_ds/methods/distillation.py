"""Training on cross-entropy, with the divergence from a frozen teacher (Eq. 3) or without (the paper's CPT)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ddk_ds.config import Loss
from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.student import Student
from ddk_ds.engine.teacher import Teacher
from ddk_ds.kernels import KDLoss, Options, linear_kd_loss
from ddk_ds.methods.base import Batch, Stateless, cross_entropy, tokens_of


class ContinuedPretraining(Stateless):
    """Continued pre-training: next-token cross-entropy of the student, without a teacher."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def teacher_outputs(self, batches: Sequence[Batch]) -> AbstractContextManager[Sequence[None]]:
        """Yield None for each micro-batch, because there is no teacher."""
        return nullcontext([None] * len(batches))

    def loss(self, student: Student, batch: Batch, teacher_output: None) -> KDLoss:
        """Run the student and return the micro-batch's part of the step's mean cross-entropy."""
        return student(batch.input_ids, partial(cross_entropy, batch=batch, options=self._options), batch.positions)


class WithDivergence(Stateless):
    """CE + gamma * T^2 * D(teacher, student), whatever is known of the teacher; its subclasses say what that is.

    Without T^2 if `loss.temperature_squared` is False.
    """

    def __init__(self, loss: Loss, options: Options) -> None:
        self._loss = loss
        self._options = replace(
            options,
            divergence=loss.divergence,
            coefficient=loss.coefficient,
            scale_by_temperature=loss.temperature_squared,
        )

    @contextmanager
    def teacher_outputs(self, batches: Sequence[Batch]) -> Iterator[Iterable[Any]]:
        """Yield what is known of the teacher for each micro-batch; None, and nothing is computed, while gamma is 0."""
        if self.options_at(batches[0]).gamma == 0:
            yield [None] * len(batches)
            return
        with self.known(batches) as outputs:
            yield outputs

    def loss(self, student: Student, batch: Batch, teacher_output: Any) -> KDLoss:
        """Run the student and return the micro-batch's part of the step's loss.

        The loss is the cross-entropy alone if `teacher_output` is None.
        """
        if teacher_output is None:
            return student(batch.input_ids, partial(cross_entropy, batch=batch, options=self._options), batch.positions)
        return student(
            batch.input_ids, partial(self.distil, teacher_output=teacher_output, batch=batch), batch.positions
        )

    def known(self, batches: Sequence[Batch]) -> AbstractContextManager[Iterable[Any]]:
        """Yield one output for each micro-batch, which `distil` takes. Collective."""
        raise NotImplementedError

    def distil(self, hidden: torch.Tensor, head: OutputHead, teacher_output: Any, batch: Batch) -> KDLoss:
        """Compute the micro-batch's part of the loss from hidden (n, Hs), n = B*L."""
        raise NotImplementedError

    def options_at(self, batch: Batch) -> Options:
        """Return the kernel's options with gamma and the temperature of `batch.progress`."""
        return replace(
            self._options,
            gamma=scheduled(self._loss.gamma, self._loss.gamma_end, batch.progress),
            temperature=scheduled(self._loss.temperature, self._loss.temperature_end, batch.progress),
        )


class Distillation(WithDivergence):
    """The loss, Eq. 3, of every method that has its teacher in each step and differs in mixture or divergence alone."""

    def __init__(self, teacher: Teacher, loss: Loss, options: Options) -> None:
        super().__init__(loss, options)
        self._teacher = teacher

    @contextmanager
    def known(self, batches: Sequence[Batch]) -> Iterator[Sequence[torch.Tensor]]:
        """Yield the teacher's last hidden states (B*L, Ht) of each micro-batch."""
        hidden = self._teacher.hidden(*tokens_of(batches))
        with self._teacher.shared_head(batches):
            yield hidden

    def distil(self, hidden: torch.Tensor, head: OutputHead, teacher_output: torch.Tensor, batch: Batch) -> KDLoss:
        """Compute the micro-batch's part of Eq. 3 from hidden (n, Hs) and the teacher's (n, Ht), n = B*L."""
        with self._teacher.head.gathered() as teacher_head:
            return linear_kd_loss(
                hidden,
                head.weight,
                teacher_output,
                teacher_head.weight,
                batch.labels.flatten(),
                num_valid=batch.num_valid,
                options=replace(self.options_at(batch), student_form=head.form, teacher_form=teacher_head.form),
                student_bias=head.bias,
                teacher_bias=teacher_head.bias,
                row_weights=batch.row_weights,
                per_token=batch.by_token,
            )


def scheduled(start: float, end: float | None, progress: float) -> float:
    """Return the value at `progress` (0..1) on the line from `start` to `end`; `start` if `end` is None."""
    return start if end is None else start + (end - start) * progress
