"""Everything a run must remember besides weights and optimizer: a few kB of JSON, free of the world size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ddk_ds.mixture.interval_state import IntervalState


@dataclass
class RunState:
    """Where the run stands. Equal on every rank."""

    data: IntervalState
    """Interval, counts, cursors, samples consumed."""
    step: int = 0
    """Optimizer steps done."""
    proportions: list[float] = field(default_factory=list)
    """r_t of the running interval, in the order of the domains; empty before the first."""
    smoothed_ppl: list[float] = field(default_factory=list)
    """The student's smoothed perplexities by domain that r_t was decided by; empty without mixture.ppl_smoothing."""
    domain_tokens: list[int] = field(default_factory=list)
    """Valid tokens trained on so far, by domain."""
    student_before: list[float] = field(default_factory=list)
    """Perplexity of the student before step 1, by domain."""
    chunk_tokens: int = 0
    """Tokens of a chunk in the loss: a resumed run adds up in the order in which it began."""
    skipped_in_row: int = 0
    """Steps without a finite gradient that ended with the last one."""
    spikes_in_row: int = 0
    """Steps with a spike of the loss that ended with the last one."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last good steps."""
    last_ratio: list[float] = field(default_factory=list)
    """Ratio to the teacher by domain at the last interval's beginning."""
    rises: list[int] = field(default_factory=list)
    """Intervals in a row that each domain's ratio has risen."""
    skip_until: int = 0
    """Samples up to this position are left out (see `position`): a roll-back passed over them."""
    method: dict[str, Any] = field(default_factory=dict)
    """What the method remembers from step to step."""
    train_s: float = 0.0
    """Seconds of training and measuring so far, restarts included."""

    @property
    def position(self) -> int:
        """Samples of the global order that are behind the run, trained on or left out."""
        return sum(self.data.drawn) - self.data.total + self.data.consumed

    def leave_out(self) -> None:
        """Pass over the samples of this interval that come before `skip_until`."""
        left = self.data.total - self.data.consumed
        self.data = self.data.consume(min(left, max(0, self.skip_until - self.position)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON for the checkpoint's client state."""
        return {**vars(self), "data": self.data.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        """Inverse of `to_json`."""
        return cls(**{**values, "data": IntervalState.from_json(values["data"])})
