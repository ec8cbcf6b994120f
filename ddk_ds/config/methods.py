"""The methods of the key `method`: their presets for other keys, and the sections that only they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from ddk_ds.config.paths import FiltersPath
from ddk_ds.config.sections import Fraction, Natural, NonNegativeFloat, Section

MethodName = Literal[
    "cpt", "kd", "ddk", "ddk_no_smoothing", "ddk_equal", "minillm", "ted", "ted_filters", "doremi_proxy"
]

OF_STAGES = ("doremi",)
"""Methods whose every run has another method: `ddk stages` starts their runs."""


@dataclass(frozen=True)
class Preset:
    """A method's properties: other rooms ask for these and never for its name (tests/unit/test_methods.py)."""

    description: str
    """The method in a few words, for model cards."""
    controller: str
    """Value of `mixture.controller` unless the configuration sets it."""
    divergence: str | None = None
    """Value of `loss.divergence` unless the configuration sets it; None if the method computes no divergence."""
    teacher: bool = True
    """True if the method needs a teacher; otherwise it is an error to have one."""
    always_runs_teacher: bool = False
    """True if every step runs the teacher, also when gamma is 0."""
    filters: Literal["new", "loaded"] | None = None
    """TED's filters: made anew, or loaded from `ted.filters` with the teacher's frozen. None without filters."""
    freezes_student: bool = False
    """True if the filters alone are trained."""
    one_of_stages: bool = False
    """True if a result takes several runs, of which one has this method."""
    takes_loss_weights: bool = True
    """False if `mixture.loss_weights` and `mixture.source: training` have no meaning in the method's loss."""
    by_definition: str | None = None
    """Key that makes the method what it is: with another value it would be another method, which is refused."""

    @property
    def sets(self) -> dict[str, str]:
        """Values that the method gives to other keys, unless the configuration sets them."""
        divergence = {} if self.divergence is None else {"loss.divergence": self.divergence}
        return {"mixture.controller": self.controller, **divergence}


METHODS: dict[str, Preset] = {
    # The paper's baselines sample domains by their size (arXiv 2407.16154, Section 4.1); its ablations are in Table 5.
    "cpt": Preset(
        "continued pretraining on next-token cross-entropy, without a teacher",
        "by_size",
        teacher=False,
    ),
    "kd": Preset(
        "distillation (cross-entropy and a divergence from the teacher) on domains drawn by their size",
        "by_size",
        "forward_kl",
    ),
    "ddk": Preset(
        "DDK: distillation with domains drawn more often the further the student is behind its teacher there",
        "ddk",
        "forward_kl",
    ),
    "ddk_no_smoothing": Preset(
        "DDK without the smoothing of its domain factors",
        "ddk_no_smoothing",
        "forward_kl",
        by_definition="mixture.controller",
    ),
    "ddk_equal": Preset(
        "distillation on domains drawn equally often", "equal", "forward_kl", by_definition="mixture.controller"
    ),
    "minillm": Preset(
        "distillation by the reverse divergence", "by_size", "reverse_kl", by_definition="loss.divergence"
    ),
    "ted": Preset(
        "task-aware layer-wise distillation (TED)",
        "by_size",
        "forward_kl",
        always_runs_teacher=True,
        filters="loaded",
        one_of_stages=True,
        takes_loss_weights=False,
    ),
    "ted_filters": Preset(
        "the first stage of TED, which trains filters and leaves the student as it was",
        "by_size",
        always_runs_teacher=True,
        filters="new",
        freezes_student=True,
        one_of_stages=True,
        takes_loss_weights=False,
    ),
    "doremi_proxy": Preset(
        "the proxy model of DoReMi, trained by group DRO",
        "equal",
        always_runs_teacher=True,
        one_of_stages=True,
        takes_loss_weights=False,
        by_definition="mixture.controller",
    ),
}


class Ted(Section):
    """Task-aware layer-wise distillation (arXiv 2210.01351): `method: ted_filters`, and after it `method: ted`."""

    layers: tuple[tuple[Natural, Natural], ...] | None = Field(default=None, min_length=1)
    """Pairs of matched layers, [student's, teacher's], numbered from 0; null: four pairs at equal distances; the
    last pair is the last layers."""
    weight: NonNegativeFloat = 1.0
    """Weight of the mean squared error between filtered hidden states."""
    filters: FiltersPath | None = None
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
    """Training method (docs/methods.md). It sets mixture.controller and loss.divergence unless they are given beside
    it; the override `method=` refuses those that the file sets otherwise."""
    ted: Ted = Ted()
    doremi: Doremi = Doremi()

    @property
    def preset(self) -> Preset:
        """Preset of the chosen method: its defaults for other keys, and what it needs from the run."""
        return METHODS[self.method]

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        preset = METHODS.get(values.get("method", "ddk")) if isinstance(values, dict) else None
        if preset is None:
            return values
        filled = dict(values)
        for name, value in preset.sets.items():
            section, _, key = name.partition(".")
            given = filled.get(section, {})
            if isinstance(given, dict):
                filled[section] = {key: value, **given}
        return filled
