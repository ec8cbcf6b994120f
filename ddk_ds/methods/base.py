"""The protocol that all methods follow, and functions that several of them use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ddk_ds.comm import Comm
from ddk_ds.data.teacher_samples import Record
from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.student import Student
from ddk_ds.engine.teacher import Teacher
from ddk_ds.engine.transfers import to_device
from ddk_ds.kernels import KDLoss, Options, linear_kd_loss, linear_nll

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """A rank's micro-batch, and the token counts of its optimizer step."""

    input_ids: torch.Tensor
    """(B, L) int64 token ids."""
    labels: torch.Tensor
    """(B, L) int64, or this rank's part of the positions (`train.sequence_parallel`); tokens whose label is
    IGNORE_INDEX are ignored."""
    domain: torch.Tensor
    """(B,) int64 on the CPU: index of each sample's domain."""
    domain_tokens: torch.Tensor
    """(N,) float64: valid tokens of the optimizer step by domain, summed over ranks and micro-batches."""
    num_valid: torch.Tensor
    """Scalar: the sum of `domain_tokens`, or 1 in a step without any."""
    progress: float
    """Fraction of the run's steps that are done, 0..1."""
    sample_id: torch.Tensor | None = None
    """(B,) int64 on the CPU: global ids of the samples (data/loader.py)."""
    said: Sequence[Record | None] = ()
    """(B,) what a cache of the teacher has of the samples; () if it was not looked for."""
    positions: torch.Tensor | None = None
    """(B, L) int64 on the CPU, of the tokens in their documents; None if the documents of a sample are not kept apart.
    """
    weights: torch.Tensor | None = None
    """(B,) float32 on the device, factors of the samples' losses (`mixture.loss_weights`); None: all are 1."""
    targets: torch.Tensor | None = None
    """(B, L) bool on the CPU, True for the tokens that are targets; None: all are."""
    by_token: bool = False
    """True if the losses of single tokens are wanted with the step's (`mixture.source: training`)."""

    @property
    def row_weights(self) -> torch.Tensor | None:
        """Return the factor of each position's loss, (B*L,); None if all are 1."""
        return None if self.weights is None else self.weights.repeat_interleave(self.labels.shape[1])


def next_token_labels(
    input_ids: torch.Tensor, positions: torch.Tensor | None = None, targets: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the labels (B, L) of input_ids (B, L): each is the id of the next token, the last is IGNORE_INDEX.

    With the `positions` (B, L) of the tokens in their documents, on the CPU, so is that of each document's last token,
    and with `targets` (B, L) bool, on the CPU, that of each token before one that is no target.
    """
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[:, :-1] = input_ids[:, 1:]
    if positions is not None:
        first = to_device(positions, labels.device)[:, 1:] == 0
        labels[:, :-1].masked_fill_(first, IGNORE_INDEX)
    if targets is not None:
        labels[:, :-1].masked_fill_(~to_device(targets, labels.device)[:, 1:], IGNORE_INDEX)
    return labels


def tokens_of(batches: Sequence[Batch]) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Return the token ids and positions (B, L) of each micro-batch, as `Teacher.hidden` takes them."""
    return [batch.input_ids for batch in batches], [batch.positions for batch in batches]


def own_labels(
    model: Student | Teacher,
    input_ids: torch.Tensor,
    positions: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the labels of input_ids (B, L) at the positions whose hidden states this rank has: all, or its part."""
    labels = next_token_labels(input_ids, positions, targets)
    return labels if model.sequence is None else model.sequence.part(labels)


class Method(Protocol):
    """A training method: its loss, metrics, state and files.

    The loop makes a new object for each interval, from the `state_dict` of the object before.
    """

    def teacher_outputs(self, batches: Sequence[Batch]) -> AbstractContextManager[Iterable[Any]]:
        """Run the frozen model for `batches`: the micro-batches of one teacher pass, or with a cache those of the step.

        Yield one output for each micro-batch, which `loss` takes. The model's head can stay gathered until the context
        ends. Collective.
        """

    def loss(self, student: Student, batch: Batch, teacher_output: Any) -> KDLoss:
        """Run the student and return the micro-batch's part of the step's loss. Collective.

        The part is a sum over the micro-batch's valid tokens divided by their number in the complete step. The
        parts of all micro-batches and ranks add up to the step's loss.
        """

    def step_sums(self) -> torch.Tensor:
        """Return numbers (n,) float64 of this rank's part of the step, on the device, to be summed over the ranks.

        The loop calls it after the last micro-batch of the step. The next step begins new sums.
        """

    def end_step(self, sums: Sequence[float]) -> dict[str, Any]:
        """Return the metrics of the step that only this method has, for the ledger.

        `sums` (n,) are those of all ranks' `step_sums`.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state that `make_method` resumes from, as plain JSON for the checkpoint; equal on every rank."""

    def export(self, student: Student, directory: Path, names: Sequence[str], comm: Comm) -> None:
        """Write the method's own files to `directory`, next to the exported student, at the end of the run. Collective.

        `names` are the domains in the order of the run.
        """


class Stateless:
    """A base of methods without metrics, state or files of their own."""

    def step_sums(self) -> torch.Tensor:
        """Return no numbers."""
        return torch.zeros(0, dtype=torch.float64)

    def end_step(self, sums: Sequence[float]) -> dict[str, Any]:
        """Return {}: the method adds no metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return {}: the method has no state."""
        return {}

    def export(self, student: Student, directory: Path, names: Sequence[str], comm: Comm) -> None:
        """Write nothing, since the method has no files of its own."""


def cross_entropy(hidden: torch.Tensor, head: OutputHead, batch: Batch, options: Options) -> KDLoss:
    """Compute the micro-batch's part of the step's mean cross-entropy from hidden states (B*L, H) and an output head.

    It is the sum over the micro-batch's valid tokens divided by `batch.num_valid`.
    """
    return linear_kd_loss(
        hidden,
        head.weight,
        None,
        None,
        batch.labels.flatten(),
        num_valid=batch.num_valid,
        options=replace(options, gamma=0.0, student_form=head.form),
        student_bias=head.bias,
        row_weights=batch.row_weights,
        per_token=batch.by_token,
    )


def token_losses(hidden: torch.Tensor, head: OutputHead, labels: torch.Tensor, options: Options) -> torch.Tensor:
    """Compute -log p of each label in nats, (n,), from hidden states (n, H) and an output head, without a gradient.

    The loss is 0 where the label is IGNORE_INDEX.
    """
    return linear_nll(hidden, head.weight, labels, options=replace(options, student_form=head.form), bias=head.bias)
