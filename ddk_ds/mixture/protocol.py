"""What a controller is: the proportions that it continues from are handed to it, it holds nothing but its options."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

from ddk_ds.mixture.factors import Values, Vector


class Controller(Protocol):
    """Decides the proportions (N,) of the next interval from perplexities; pure."""

    @property
    def name(self) -> str:
        """The kind, as in the configuration."""

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher's perplexities are needed; else None may be handed in for them."""

    @property
    def ppl_smoothing(self) -> float:
        """Weight of the past in the student's perplexity that is to be handed in (see `decide`); 0: none."""

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """Proportions of interval 0."""

    def update(self, proportions: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int) -> Vector:
        """Proportions of `interval` (from 1), the one after that which had `proportions`."""

    def state_dict(self) -> dict[str, Any]:
        """All that decides what it returns, as plain JSON."""


def options_of(controller: Any) -> dict[str, Any]:
    """The `state_dict` of a controller that is a dataclass: its kind and options."""
    options = {key: _plain(value) for key, value in asdict(controller).items()}
    return {**options, "name": controller.name}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
