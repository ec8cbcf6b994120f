"""All that a run remembers besides weights and optimizer: a few kB of JSON that do not depend on the world size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ddk_ds.errors import CheckpointError
from ddk_ds.mixture.decide import Decision
from ddk_ds.mixture.domain_vectors import Memory
from ddk_ds.mixture.interval_state import IntervalState
from ddk_ds.mixture.training_losses import interval_means


@dataclass
class RunState:
    """Position and memory of the run; equal on every rank."""

    data: IntervalState
    """Place in the data: interval, counts, cursors, samples consumed."""
    step: int = 0
    """Optimizer steps done."""
    proportions: list[float] = field(default_factory=list)
    """Proportions (N,) of the running interval, in the order of the domains; empty before the first interval."""
    log_proportions: list[float | None] = field(default_factory=list)
    """Their natural logs (N,), which the next decision continues from; None where a proportion is exactly 0."""
    smoothed_ppl: list[float] = field(default_factory=list)
    """Smoothed perplexities (N,) of the student that decided the proportions; empty without mixture.ppl_smoothing."""
    controller_memory: Memory = None
    """What the controller keeps for its next decision; None if it keeps nothing."""
    training_sums: list[list[float]] = field(default_factory=list)
    """(3, N) tokens, cross-entropies and divergences in nats of this interval's steps, with `mixture.source: training`;
    else empty."""
    training_losses: list[list[float | None]] = field(default_factory=list)
    """(2, N) `interval_means` of the intervals before, which decided this one's proportions; empty as above."""
    domain_tokens: list[int] = field(default_factory=list)
    """Valid tokens (N,) trained on so far."""
    student_before: list[float] = field(default_factory=list)
    """Perplexities (N,) of the student before step 1."""
    chunk_tokens: int = 0
    """Tokens of a chunk in the loss: a resumed run adds up in the same order as before."""
    good_step: int = 0
    """Last step that was neither skipped nor a spike: a roll-back goes to it or before."""
    skipped_in_row: int = 0
    """Number of steps without a finite gradient up to the last step, in a row."""
    spikes_in_row: int = 0
    """Number of steps with a spike of the loss up to the last step, in a row."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last steps that were neither skipped nor spikes (see guard.py)."""
    last_ratio: list[float] = field(default_factory=list)
    """Ratios (N,) to the teacher at the beginning of the last interval."""
    rises: list[int] = field(default_factory=list)
    """Number of intervals in a row (N,) in which each domain's ratio has risen."""
    skip_until: int = 0
    """Samples before this position are left out (see `position`), after a roll-back."""
    method: dict[str, Any] = field(default_factory=dict)
    """State of the method, in plain JSON."""
    train_s: float = 0.0
    """Seconds of training and measuring so far, restarts included."""

    def add_losses(self, tokens: list[int], losses: list[float]) -> None:
        """Add a step's tokens (N,) and losses (2N,) to `training_sums`, unless one is not finite."""
        if losses and all(map(math.isfinite, losses)):
            rows: list[Sequence[float]] = [tokens, losses[: len(tokens)], losses[len(tokens) :]]
            before = self.training_sums or [[0.0] * len(tokens)] * 3
            self.training_sums = np.add(before, rows).tolist()

    @property
    def measured_in_training(self) -> list[list[float | None]] | None:
        """Return the means (2, N) of this interval's losses; None if there are none."""
        return interval_means(self.training_sums, self.training_losses) if self.training_sums else None

    @property
    def position(self) -> int:
        """Return the number of samples of the global order that were trained on or left out so far."""
        return sum(self.data.drawn) - self.data.total + self.data.consumed

    @property
    def decision(self) -> Decision | None:
        """Return the decision on the running interval; None before the first."""
        if not self.proportions:
            return None
        return Decision(self.proportions, self.smoothed_ppl, self.log_proportions, self.controller_memory)

    def leave_out(self) -> None:
        """Advance past the samples of this interval that lie before `skip_until`."""
        left = self.data.total - self.data.consumed
        self.data = self.data.consume(min(left, max(0, self.skip_until - self.position)))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON for the client state of a checkpoint."""
        return {**vars(self), "data": self.data.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        """Return the state that `to_json` wrote.

        An older version's has no memory of a controller and no losses of training. Raises CheckpointError if another
        field is missing, or one is unknown.
        """
        values = {"controller_memory": None, "training_sums": [], "training_losses": [], **values}
        if odd := set(values) ^ set(cls.__dataclass_fields__):
            raise CheckpointError(f"the checkpoint's state has missing or unknown fields: {sorted(odd)}")
        return cls(**{**values, "data": IntervalState.from_json(values["data"])})
