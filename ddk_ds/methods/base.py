"""The protocol of the methods, and what several of them use."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ddk_ds.comm import Comm
from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.student import Student
from ddk_ds.kernels import KDLoss, Options, linear_kd_loss, linear_nll

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """A rank's micro-batch, and the token counts of its optimizer step."""

    input_ids: torch.Tensor
    """(B, L) int64."""
    labels: torch.Tensor
    """(B, L) int64, ignored where IGNORE_INDEX."""
    domain: torch.Tensor
    """(B,) int64, on the CPU."""
    domain_tokens: torch.Tensor
    """(N,) float64: valid tokens of the optimizer step by domain, summed over ranks and micro-batches."""
    num_valid: torch.Tensor
    """Scalar: the sum of `domain_tokens`."""
    progress: float
    """Fraction of the run's steps that are done, 0..1."""


def next_token_labels(input_ids: torch.Tensor) -> torch.Tensor:
    """Return labels (B, L) of input_ids (B, L): the next token; the last position has IGNORE_INDEX."""
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[:, :-1] = input_ids[:, 1:]
    return labels


class Method(Protocol):
    """A loss and what belongs to it. The loop makes a new object for each interval, from `state_dict` of the last."""

    def teacher_outputs(self, batches: Sequence[Batch]) -> AbstractContextManager[Sequence[Any]]:
        """Run the frozen model once for all micro-batches and yield its output for each, for `loss`. Collective."""

    def loss(self, student: Student, batch: Batch, teacher_output: Any) -> KDLoss:
        """Compute sums over the micro-batch's valid tokens, divided by the step's. Runs the student: collective."""

    def end_step(self, comm: Comm) -> dict[str, Any]:
        """Return the method's own metrics for the ledger, after the step's last micro-batch. Collective."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON for the checkpoint, equal on every rank; `make_method` takes it."""

    def export(self, student: Student, directory: Path, names: Sequence[str], comm: Comm) -> None:
        """Write the files that the method exports next to the student, at the run's end. Collective."""


class Stateless:
    """A base of methods without metrics, state or files of their own."""

    def end_step(self, comm: Comm) -> dict[str, Any]:
        """Return no metrics of the method."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state, {}."""
        return {}

    def export(self, student: Student, directory: Path, names: Sequence[str], comm: Comm) -> None:
        """Do nothing: the student is all that is exported."""


def cross_entropy(hidden: torch.Tensor, head: OutputHead, batch: Batch, options: Options) -> KDLoss:
    """Compute the batch's part of the step's mean cross-entropy, from hidden (B*L, H) through a head."""
    return linear_kd_loss(
        hidden,
        head.weight,
        None,
        None,
        batch.labels.flatten(),
        num_valid=batch.num_valid,
        options=replace(options, gamma=0.0, student_form=head.form),
        student_bias=head.bias,
    )


def token_losses(hidden: torch.Tensor, head: OutputHead, labels: torch.Tensor, options: Options) -> torch.Tensor:
    """Compute -log p (n,) of each label from hidden (n, H) through a head, 0 at IGNORE_INDEX, without a gradient."""
    return linear_nll(hidden, head.weight, labels, options=replace(options, student_form=head.form), bias=head.bias)
