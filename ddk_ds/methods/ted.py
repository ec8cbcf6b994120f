"""TED, task-aware layer-wise distillation (arXiv 2210.01351), in two stages, each a run of its own.

A filter at each matched layer of both models takes its hidden states to the teacher's width. Stage 1 (`ted_filters`)
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
from ddk_ds.methods.base import IGNORE_INDEX, Batch, Stateless, cross_entropy
from ddk_ds.methods.distillation import Distillation

Tapped = tuple[torch.Tensor, list[torch.Tensor]]  # last hidden states (n, Ht), those of the matched layers

FILTERS_FILE = "filters.safetensors"


class _Layerwise(Stateless):
    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    @contextmanager
    def taught(self, batches: Sequence[Batch]) -> Iterator[Sequence[Tapped]]:
        """The teacher's hidden states: the last, and those of its matched layers."""
        tapped = self._teacher.hidden_with_layers([batch.input_ids for batch in batches])
        with self._teacher.shared_head(batches):
            yield tapped


class TedFilters(_Layerwise):
    """Stage 1. The loss is the mean over all filters of the cross-entropy that each reaches."""

    def __init__(self, teacher: Teacher, options: Options) -> None:
        super().__init__(teacher)
        self._options = options

    def loss(self, student: Student, batch: Batch, taught: Tapped) -> KDLoss:
        """See `Method`."""
        _, (ours, theirs) = student.filtered(batch.input_ids, None, taught[1])
        with self._teacher.head.gathered() as head:
            losses = [cross_entropy(states, head, batch, self._options) for states in (*ours, *theirs)]
        loss = torch.stack([one.loss for one in losses]).mean()
        return KDLoss(loss, loss.detach(), torch.zeros_like(loss))

    def export(self, student: Student, directory: Path, names: Sequence[str], comm: Comm) -> None:
        """Write filters.safetensors, which `ted.filters` names in stage 2."""
        write_filters(student.filters, directory / FILTERS_FILE, comm)


class Ted(_Layerwise):
    """Stage 2: CE + gamma * T^2 * D + weight * MSE, the last the mean over pairs, tokens and the teacher's width."""

    def __init__(self, distillation: Distillation, teacher: Teacher, weight: float) -> None:
        super().__init__(teacher)
        self._distillation = distillation
        self._weight = weight
        self._mse: torch.Tensor | float = 0.0

    def loss(self, student: Student, batch: Batch, taught: Tapped) -> KDLoss:
        """See `Method`."""
        hidden, teacher_states = taught
        result, (ours, theirs) = student.filtered(
            batch.input_ids,
            lambda states, head: self._distillation.distil(states, head, hidden, batch),
            teacher_states,
        )
        valid = (batch.labels.flatten() != IGNORE_INDEX).unsqueeze(1)
        rows = [((a.float() - b.float()).square() * valid).mean(1).sum() for a, b in zip(ours, theirs, strict=True)]
        mse = torch.stack(rows).mean() / batch.num_valid
        self._mse = self._mse + mse.detach()
        return result._replace(loss=result.loss + (self._weight * mse).to(result.loss.dtype))

    def export(self, student: Student, directory: Path, names: Sequence[str], comm: Comm) -> None:
        """Write the filters as they are now."""
        write_filters(student.filters, directory / FILTERS_FILE, comm)

    def end_step(self, comm: Comm) -> dict[str, Any]:
        """`mse`, the step's mean squared error between filtered hidden states."""
        mse = comm.all_reduce_sum(torch.as_tensor(self._mse, dtype=torch.float64))
        self._mse = 0.0
        return {"mse": float(mse)}
