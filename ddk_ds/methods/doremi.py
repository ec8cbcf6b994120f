"""DoReMi's proxy run (arXiv 2305.10429, Algorithm 1): group DRO finds the weights of the domains.

The proxy is the run's student, and the reference model takes the teacher's place. A step minimises
sum_i w_i * (mean cross-entropy of domain i's tokens), divided by sum_i w_i; both sums are over the domains that have
tokens in the step. After it the weights follow the domains' excess losses over the reference, each token's clipped at
0, and the next step uses them: this needs no second pass over a batch, whatever the number of micro-batches and ranks.
A domain without tokens keeps its last excess, as in the authors' code (github.com/sangmichaelxie/doremi); before its
first tokens it has the mean of the others, which leaves its weight where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ddk_ds.comm import Comm, call_together
from ddk_ds.config import Doremi
from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.student import Student
from ddk_ds.engine.teacher import Teacher
from ddk_ds.engine.transfers import to_device
from ddk_ds.files import write_text, written
from ddk_ds.kernels import KDLoss, Options, linear_kd_loss
from ddk_ds.methods.base import IGNORE_INDEX, Batch, token_losses, tokens_of
from ddk_ds.mixture.domain_vectors import Factors, mixed, softmax

WEIGHTS_FILE = "proportions.yaml"


class DoremiProxy:
    """Group DRO over domains. It exports the weights, averaged over all steps, as `proportions.yaml`."""

    def __init__(
        self, reference: Teacher, options: Options, doremi: Doremi, num_domains: int, state: dict[str, Any]
    ) -> None:
        self._reference = reference
        self._options = options
        self._doremi = doremi
        logs = state.get("log_weights")
        weights = np.array(state.get("weights", [1 / num_domains] * num_domains))
        self._weights = Factors.of(weights, None if logs is None else np.array(logs))
        self._last_excess = np.array(state.get("excess", [None] * num_domains), np.float64)  # NaN: none yet
        self._sum = np.array(state.get("sum", [0.0] * num_domains))
        self._steps = int(state.get("steps", 0))
        self._excess = torch.zeros(2, num_domains, dtype=torch.float64)

    @contextmanager
    def teacher_outputs(self, batches: Sequence[Batch]) -> Iterator[Sequence[torch.Tensor]]:
        """Yield the reference model's loss of each token, (B*L,) in nats for each micro-batch; 0 where ignored."""
        hidden = self._reference.hidden(*tokens_of(batches))
        with self._reference.clock.stage("teacher"), self._reference.head.gathered() as head:
            losses = [
                token_losses(states, head, batch.labels.flatten(), self._options)
                for states, batch in zip(hidden, batches, strict=True)
            ]
        yield losses

    def loss(self, student: Student, batch: Batch, teacher_output: torch.Tensor) -> KDLoss:
        """Run the student and return the micro-batch's part of the step's loss, as the module's docstring has it.

        `ce` of the result is its part of the mean over all tokens, without weights. The excess losses over
        `teacher_output`, the reference model's losses, are kept for `end_step`.
        """
        return student(batch.input_ids, partial(self._weighted, batch=batch, reference=teacher_output), batch.positions)

    def _weighted(self, hidden: torch.Tensor, head: OutputHead, batch: Batch, reference: torch.Tensor) -> KDLoss:
        length = batch.labels.shape[1]
        labels, device = batch.labels.flatten(), hidden.device
        weights = to_device(torch.from_numpy(self._weights.proportions), device) * (batch.domain_tokens > 0)
        weights = (weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)).to(
            torch.promote_types(hidden.dtype, torch.float32)
        )
        loss = hidden.new_zeros((), dtype=torch.float32)
        ce = torch.zeros((), dtype=torch.float64, device=device)
        excess = torch.zeros_like(self._excess, device=device)
        for domain in batch.domain.unique().tolist():
            rows = to_device(torch.nonzero((batch.domain == domain).repeat_interleave(length)).flatten(), device)
            valid = labels[rows] != IGNORE_INDEX
            result = linear_kd_loss(
                hidden[rows],
                head.weight,
                None,
                None,
                labels[rows],
                num_valid=batch.domain_tokens[domain],
                options=replace(self._options, gamma=0.0, student_form=head.form),
                student_bias=head.bias,
                per_token=True,
            )
            assert result.token_ce is not None, "per_token is set"
            token_ce = result.token_ce.double() * batch.domain_tokens[domain]
            loss = loss + weights[domain] * result.loss
            ce += token_ce.sum()
            excess[0, domain] = ((token_ce - reference[rows]).clamp(min=0) * valid).sum()
            excess[1, domain] = valid.sum()
        self._excess = to_device(self._excess, device) + excess
        return KDLoss(loss, ce / batch.num_valid, torch.zeros_like(ce))

    def step_sums(self) -> torch.Tensor:
        """Return this rank's sums of excess losses (N,) and its numbers of tokens (N,), one behind the other."""
        sums, self._excess = self._excess.flatten(), torch.zeros_like(self._excess)
        return sums

    def end_step(self, sums: Sequence[float]) -> dict[str, Any]:
        """Update the weights of the domains from the step's excess losses.

        Return `weights` (after the update) and `excess` (mean over a domain's tokens in the last step that had any, in
        nats; None before it), both in the order of the run's domains. An excess that is not finite leaves both
        unchanged.
        """
        total, tokens = np.array(sums).reshape(2, -1)
        if np.isfinite(total).all() and tokens.any():  # otherwise the step was skipped
            self._last_excess = np.where(tokens > 0, total / np.maximum(tokens, 1), self._last_excess)
            excess = np.where(np.isnan(self._last_excess), np.nanmean(self._last_excess), self._last_excess)
            smoothing = self._doremi.smoothing
            raised = softmax(self._weights.logs + self._doremi.step_size * excess)
            self._weights = mixed(1 - smoothing, raised, smoothing / len(excess))
            self._sum = self._sum + self._weights.proportions
            self._steps += 1
        return {key: self.state_dict()[key] for key in ("weights", "excess")}

    def state_dict(self) -> dict[str, Any]:
        """Return, (N,) each, `weights`, `log_weights`, `excess` (the last ones) and `sum` of the weights; and `steps`.

        The sum is that over all steps, whose number is `steps`.
        """
        return {
            "weights": self._weights.proportions.tolist(),
            "log_weights": self._weights.logs.tolist(),
            "excess": [None if np.isnan(value) else value for value in self._last_excess.tolist()],
            "sum": self._sum.tolist(),
            "steps": self._steps,
        }

    def export(self, student: Student, directory: Path, names: Sequence[str], comm: Comm) -> None:
        """Write `proportions.yaml`: each domain's weight, averaged over all steps.

        The file has the form of `mixture.proportions`. Before the first step it holds the current weights.
        """
        mean = self._sum / self._sum.sum() if self._steps else self._weights.proportions
        path, proportions = directory / WEIGHTS_FILE, dict(zip(names, mean.tolist(), strict=True))

        def write() -> None:
            with written(path):
                write_text(path, yaml.safe_dump(proportions, sort_keys=False))

        call_together(comm, write if comm.rank == 0 else lambda: None)
