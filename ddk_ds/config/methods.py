"""The methods of the key `method`: their presets for other keys, and the sections that only they have."""

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
    """Values that a method sets unless the configuration sets them."""

    controller: str
    divergence: str | None = None
    """Divergence between teacher and student; None: the method computes none."""
    teacher: bool = True
    """True if the method needs a teacher; otherwise it is an error to have one."""


METHODS: dict[str, Preset] = {
    # The paper's baselines sample domains by their size (arXiv 2407.16154, Section 4.1); its ablations are in Table 5.
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
    """Task-aware layer-wise distillation (arXiv 2210.01351): `method: ted_filters`, and after it `method: ted`."""

    layers: tuple[tuple[Natural, Natural], ...] | None = Field(default=None, min_length=1)
    """Pairs of matched layers, [student's, teacher's], numbered from 0; null: four pairs at equal distances; the
    last pair is the last layers."""
    weight: NonNegativeFloat = 1.0
    """Weight of the mean squared error between filtered hidden states."""
    filters: str | None = None
    """File filters.safetensors that a run with `method: ted_filters` has exported; `method: ted` needs it."""


class Doremi(Section):
    """Group DRO of the proxy model (DoReMi, arXiv 2305.10429, Algorithm 1), for `method: doremi_proxy`."""

    step_size: NonNegativeFloat = 1.0
    """eta, the factor of the excess losses in an update of the domains' weights."""
    smoothing: Fraction = 1e-3
    """c, the weight of equal weights in every update."""


class MethodSections(Section):
    """The keys of a run's configuration that concern its method."""

    method: MethodName = "ddk"
    """Training method (docs/methods.md). It sets mixture.controller and loss.divergence unless the configuration sets
    them."""
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
