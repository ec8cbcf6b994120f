"""The protocol that every method keeps."""

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
    """A rank's micro-batch, and what it is part of."""

    input_ids: torch.Tensor
    """(B, L) int64."""
    labels: torch.Tensor
    """(B, L) int64, ignored where IGNORE_INDEX."""
    domain: torch.Tensor
    """(B,) int64, on the CPU."""
    domain_tokens: torch.Tensor
    """(N,) float64: the valid tokens of the whole optimizer step by domain, over ranks and micro-batches."""
    num_valid: torch.Tensor
    """Scalar: their sum."""
    progress: float
    """Share of the run's steps that are done, 0..1."""


class Method(Protocol):
    """What a step minimises. A method is made anew for each interval; what it must remember is its state."""

    def taught(self, batches: Sequence[Batch]) -> AbstractContextManager[Sequence[Any]]:
        """What the frozen model says of each micro-batch, for `loss`; one pass for all of them. Collective."""

    def loss(self, student: Student, batch: Batch, taught: Any) -> KDLoss:
        """Sums over this micro-batch's valid tokens, divided by the step's. Runs the student's engine: a collective."""

    def end_step(self, comm: Comm) -> dict[str, Any]:
        """After the last micro-batch: what the ledger's step line has of the method beside the losses. Collective."""

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON for the checkpoint, equal on every rank; `make_method` takes it."""

    def export(self, student: Student, directory: Path, names: Sequence[str], comm: Comm) -> None:
        """Write what the method leaves beside the student, at the run's end. Collective."""


class Stateless:
    """A method that remembers nothing from step to step and leaves nothing behind."""

    def end_step(self, comm: Comm) -> dict[str, Any]:
        """Nothing to say."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def export(self, student: Student, directory: Path, names: Sequence[str], comm: Comm) -> None:
        """Nothing to write."""


def cross_entropy(hidden: torch.Tensor, head: OutputHead, batch: Batch, options: Options) -> KDLoss:
    """Cross-entropy of hidden (B*L, H) through a head against the batch's labels, its share of the step's mean."""
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
    """-log p of each label (n,) through a head, from hidden (n, H); 0 where it is IGNORE_INDEX. No gradient."""
    return linear_nll(hidden, head.weight, labels, options=replace(options, student_form=head.form), bias=head.bias)
