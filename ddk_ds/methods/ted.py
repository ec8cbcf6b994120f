"""TED, task-aware layer-wise distillation (arXiv 2210.01351), in two stages, each a run of its own.

A filter at each matched layer of both models maps its hidden states to the teacher's width. Stage 1 (`ted_filters`)
trains all filters on next-token cross-entropy through the teacher's frozen head, with both models frozen. Stage 2
(`ted`) trains the student and its filters on Eq. 3 plus the mean squared error between filtered hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ddk_ds.comm import Comm
from ddk_ds.engine.filters import write_filters
from ddk_ds.engine.student import Student
from ddk_ds.engine.teacher import Teacher
from ddk_ds.kernels import KDLoss, Options
from ddk_ds.methods.base import IGNORE_INDEX, Batch, Stateless, cross_entropy, tokens_of
from ddk_ds.methods.distillation import Distillation

# The teacher's last hidden states (n, Ht), and the hidden states (n, Ht) of each of its matched layers.
Tapped = tuple[torch.Tensor, list[torch.Tensor]]

FILTERS_FILE = "filters.safetensors"


class _WithFilters(Stateless):
    """The part that both stages share: the teacher's outputs, and the export of the filters."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    @contextmanager
    def teacher_outputs(self, batches: Sequence[Batch]) -> Iterator[Sequence[Tapped]]:
        """Yield the teacher's hidden states (B*L, Ht) of each micro-batch: the last, and the matched layers'."""
        outputs = self._teacher.hidden_with_layers(*tokens_of(batches))
        with self._teacher.shared_head(batches):
            yield outputs

    def export(self, student: Student, directory: Path, names: Sequence[str], comm: Comm) -> None:
        """Write all filters to filters.safetensors; `ted.filters` of stage 2 names the file of stage 1."""
        write_filters(student.filters, directory / FILTERS_FILE, comm)


class TedFilters(_WithFilters):
    """Stage 1, whose loss is the mean of the filters' cross-entropies."""

    def __init__(self, teacher: Teacher, options: Options) -> None:
        super().__init__(teacher)
        self._options = options

    def loss(self, student: Student, batch: Batch, teacher_output: Tapped) -> KDLoss:
        """Run both models' filters and return the micro-batch's part of the step's loss; its divergence is 0."""
        _, teacher_states = teacher_output
        _, (of_student, of_teacher) = student.filtered(batch.input_ids, None, teacher_states, batch.positions)
        with self._teacher.head.gathered() as head:
            losses = [cross_entropy(states, head, batch, self._options).loss for states in (*of_student, *of_teacher)]
        loss = torch.stack(losses).mean()
        return KDLoss(loss, loss.detach(), torch.zeros_like(loss))


class Ted(_WithFilters):
    """Stage 2, with the loss CE + gamma * T^2 * D + weight * MSE.

    MSE is the mean over pairs of matched layers, valid tokens and the teacher's width.
    """

    def __init__(self, distillation: Distillation, teacher: Teacher, weight: float) -> None:
        super().__init__(teacher)
        self._distillation = distillation
        self._weight = weight
        self._mse: torch.Tensor | float = 0.0

    def loss(self, student: Student, batch: Batch, teacher_output: Tapped) -> KDLoss:
        """Run the student and return the micro-batch's part of the step's loss, Eq. 3 plus weight * MSE.

        The mean squared error is also added up for `end_step`.
        """
        teacher_hidden, teacher_states = teacher_output
        result, (of_student, of_teacher) = student.filtered(
            batch.input_ids,
            lambda hidden, head: self._distillation.distil(hidden, head, teacher_hidden, batch),
            teacher_states,
            batch.positions,
        )
        valid = (batch.labels.flatten() != IGNORE_INDEX).unsqueeze(1)
        pairs = zip(of_student, of_teacher, strict=True)
        errors = [((a.float() - b.float()).square() * valid).mean(1).sum() for a, b in pairs]
        mse = torch.stack(errors).mean() / batch.num_valid
        self._mse = self._mse + mse.detach()
        return result._replace(loss=result.loss + (self._weight * mse).to(result.loss.dtype))

    def step_sums(self) -> torch.Tensor:
        """Return this rank's part of the step's mean squared error, (1,)."""
        mse, self._mse = torch.as_tensor(self._mse, dtype=torch.float64), 0.0
        return mse.reshape(1)

    def end_step(self, sums: Sequence[float]) -> dict[str, Any]:
        """Return `mse`, the step's mean squared error between filtered hidden states, over all ranks."""
        return {"mse": sums[0]}
