"""The methods that `method:` names: what each trains on, which domains it sees, and the sections of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from ddk_ds.config.sections import Fraction, Natural, NonNegativeFloat, Section

MethodName = Literal[
    "cpt", "kd", "ddk", "ddk_no_smoothing", "ddk_equal", "minillm", "ted", "ted_filters", "doremi_proxy"
]


@dataclass(frozen=True)
class Preset:
    """What a method sets unless the configuration does."""

    controller: str
    divergence: str | None = None
    """None: no divergence is computed."""
    teacher: bool = True


METHODS: dict[str, Preset] = {
    # The paper's baselines see domains by their size (arXiv 2407.16154, Section 4.1), its ablations are in Table 5.
    "cpt": Preset("by_size", teacher=False),
    "kd": Preset("by_size", "forward_kl"),
    "ddk": Preset("ddk", "forward_kl"),
    "ddk_no_smoothing": Preset("ddk_no_smoothing", "forward_kl"),
    "ddk_equal": Preset("equal", "forward_kl"),
    "minillm": Preset("by_size", "reverse_kl"),
    "ted": Preset("by_size", "forward_kl"),
    "ted_filters": Preset("by_size"),
    "doremi_proxy": Preset("equal"),
}


class Ted(Section):
    """Task-aware layer-wise distillation (arXiv 2210.01351), for `method: ted_filters` and then `method: ted`."""

    layers: tuple[tuple[Natural, Natural], ...] | None = Field(default=None, min_length=1)
    """Matched layers, [student's, teacher's] from 0; null: four pairs at equal distances, up to the last layers."""
    weight: NonNegativeFloat = 1.0
    """Weight of the mean squared error between filtered hidden states."""
    filters: str | None = None
    """filters.safetensors that the run with `method: ted_filters` exported; needed by `method: ted`."""


class Doremi(Section):
    """Group DRO of the proxy model (DoReMi, arXiv 2305.10429, Algorithm 1), for `method: doremi_proxy`."""

    step_size: NonNegativeFloat = 1.0
    """eta: how fast the domains' weights follow their excess losses."""
    smoothing: Fraction = 1e-3
    """c: share of equal weights in every update."""


class MethodSections(Section):
    """What a run's configuration holds for its method."""

    method: MethodName = "ddk"
    """cpt; kd; ddk; ddk_no_smoothing; ddk_equal; minillm; ted_filters, then ted; doremi_proxy (docs/methods.md). It
    sets mixture.controller and loss.divergence where the configuration does not."""
    ted: Ted = Ted()
    doremi: Doremi = Doremi()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        preset = METHODS.get(values.get("method", "ddk")) if isinstance(values, dict) else None
        if preset is None:
            return values
        filled = dict(values)
        for section, key, value in (
            ("mixture", "controller", preset.controller),
            ("loss", "divergence", preset.divergence),
        ):
            given = filled.get(section, {})
            if isinstance(given, dict) and value is not None:
                filled[section] = {key: value, **given}
        return filled
