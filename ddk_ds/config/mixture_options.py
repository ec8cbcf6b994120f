"""The section `mixture` of a run's configuration, and which controller uses which of its options.

Every default is the paper's method (arXiv 2407.16154). The docstrings are the text of docs/configuration.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ddk_ds.config.paths import SchedulePath
from ddk_ds.config.sections import Fraction, NonNegativeFloat, Positive, PositiveFloat, Section

ExhaustionPolicy = Literal["cycle", "cap", "stop"]
ControllerKind = Literal[
    "ddk",
    "ddk_no_smoothing",
    "equal",
    "by_size",
    "static",
    "schedule",
    "sheared_llama",
    "doremi_online",
    "ado",
    "odm",
    "loss_softmax",
    "kl_gap",
]

_WITH_SMOOTHING = ("ddk", "ddk_no_smoothing", "sheared_llama", "doremi_online", "loss_softmax", "kl_gap")
# The controllers that use an option. alpha, ratio_cap and initial_floor are not here: they can stay in a configuration
# of DDK whose controller is overridden, so that an ablation is one override.
_CONTROLLERS_WITH: dict[str, tuple[str, ...]] = {
    "proportions": ("static",),
    "schedule_file": ("schedule",),
    "initial": ("ddk",),
    "prior": ("ddk", "sheared_llama", "doremi_online", "ado", "odm", "loss_softmax", "kl_gap"),
    "reference_losses": ("sheared_llama", "doremi_online"),
    "step_size": ("doremi_online",),
    "smoothing": ("doremi_online",),
    "ppl_smoothing": _WITH_SMOOTHING,
    "floors": (*_WITH_SMOOTHING, "ado", "odm", "by_size"),
    "temperature": ("loss_softmax", "kl_gap"),
    "warmup_intervals": ("ado",),
    "history_weight": ("ado",),
    "history_exponent": ("ado",),
    "policy_weight": ("ado",),
    "min_proportion": ("ado",),
    "reward_smoothing": ("odm",),
    "measure": ("kl_gap",),
    "source": ("sheared_llama", "doremi_online", "ado", "odm", "loss_softmax", "kl_gap"),
}


def goes_with(option: str, controller: str) -> bool:
    """Return True if a controller allows this option of section `mixture`, which it may leave unused."""
    return controller in _CONTROLLERS_WITH.get(option, (controller,))


class Mixture(Section):
    """The proportions of the domains among the samples, which a controller decides before each interval."""

    controller: ControllerKind = "ddk"
    """Rule that decides the proportions: ddk (Eq. 1 and 2), ddk_no_smoothing (Eq. 1 in each interval), equal, by_size
    (by the domains' tokens), static (`proportions`), schedule (`schedule_file`), sheared_llama, doremi_online, ado,
    odm, loss_softmax or kl_gap. docs/methods.md has their formulas and sources."""
    alpha: Fraction = 0.5
    """Smoothing coefficient of Eq. 2; every domain keeps at least (1 - alpha) / N from the second interval on."""
    interval_steps: Positive = 1000
    """K, the optimizer steps between two measurements of perplexity."""
    interval_growth: PositiveFloat = 1.0
    """Growth of the intervals: interval t (from 0) has max(1, round(interval_steps * interval_growth^t)) steps; 1:
    every interval has K steps."""
    proportions: dict[str, NonNegativeFloat] | None = None
    """Proportion of each domain for `controller: static`, with the sum 1."""
    schedule_file: SchedulePath | None = None
    """YAML file for `controller: schedule`: a list of {from_interval: 0, proportions: {domain: proportion}}."""
    exclude: tuple[str, ...] = ()
    """Domains that are measured but never drawn, with any controller."""
    floors: dict[str, Fraction] = Field(default_factory=dict)
    """Least proportion of each domain named here, in every interval."""
    ppl_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Weight of the past in a moving average of the student's log perplexities, which the controller then uses in place
    of the measured ones; 0: no average."""
    prior: Literal["equal", "by_size"] | dict[str, NonNegativeFloat] = "equal"
    """Proportions in place of 1/N in Eq. 2, first proportions of sheared_llama, doremi_online and odm, mu of ado, and
    the proportions that loss_softmax and kl_gap tilt: equal, by_size, or a value for each domain."""
    initial: Literal["eq1", "equal"] = "eq1"
    """Proportions of the first interval with `controller: ddk`: eq1 (Eq. 1) or equal."""
    ratio_cap: PositiveFloat | None = None
    """Upper bound on the ratio of perplexities before exp() in Eq. 1 and 2; null: no bound, as published."""
    initial_floor: Fraction = 0.0
    """Least proportion of each domain in Eq. 1, at most 1/N; with `controller: ddk` only in the first interval. 0: no
    floor, as published."""
    reference_losses: dict[str, NonNegativeFloat] | None = None
    """Loss of each domain in nats a token, which sheared_llama and doremi_online compare with; null: the teacher's
    loss."""
    loss_weights: Literal["equal", "by_size"] | dict[str, NonNegativeFloat] | None = None
    """Weights of the domains in the loss, apart from the proportions of the samples: equal, by_size (by their tokens),
    or a value for each domain, with the sum 1. A sample's loss is multiplied by its domain's weight / its domain's
    share of the interval's samples. null: no factor, so that the proportions are the weights."""
    step_size: NonNegativeFloat = 1.0
    """eta of doremi_online: factor of the excess loss in an update."""
    smoothing: Fraction = 1e-3
    """c of doremi_online: weight of equal proportions in every update."""
    temperature: PositiveFloat = 1.0
    """T of loss_softmax and kl_gap in nats: what a domain's loss or gap is divided by before exp()."""
    measure: Literal["excess_loss", "kl"] = "excess_loss"
    """Gap of kl_gap, in nats a token. excess_loss: the student's loss less the teacher's; kl: the divergence of the
    loss, which only `source: training` measures."""
    source: Literal["held_out", "training"] = "held_out"
    """Where a controller's measurements come from: the held-out samples at each border between intervals, or the
    training samples since the last border. The held-out ones are measured in both cases."""
    warmup_intervals: Annotated[int, Field(ge=3)] = 3
    """First intervals of ado, drawn by `prior`; the first fit has as many measurements."""
    history_weight: Fraction = 0.1
    """gamma_1 of ado: weight of a step's policy in the moving average of past ones, which shares out the credit."""
    history_exponent: Fraction = 0.5
    """s of ado: exponent of that average in the preference."""
    policy_weight: Fraction = 0.1
    """gamma_2 of ado: weight of the preference in the policy; the mean of all past preferences has the rest."""
    min_proportion: Fraction = 0.01
    """delta_min of ado: least preference for a domain, at most 1/N."""
    reward_smoothing: Fraction = 0.9
    """Weight of the past, for a step, in the moving average of odm's rewards."""
    exhaustion: ExhaustionPolicy = "cycle"
    """Policy for a domain that reaches its limit `max_passes`. cycle: no limit, the domain is drawn pass after pass;
    cap: the other domains take its samples; stop: the run ends."""
    exhaustion_by_domain: dict[str, ExhaustionPolicy] = Field(default_factory=dict)
    """Policy of each domain named here, in place of `exhaustion`."""
    max_passes: PositiveFloat | None = None
    """Limit of each domain with cap or stop, in passes over its samples; null: one pass for stop, an error for cap."""

    @model_validator(mode="after")
    def _options_go_with_the_controller(self) -> Mixture:
        for option, controllers in _CONTROLLERS_WITH.items():
            value = getattr(self, option)
            if self.controller not in controllers and value != type(self).model_fields[option].get_default(
                call_default_factory=True
            ):
                raise ValueError(
                    f"{option} is {value}, which controller: {self.controller} does not use: remove it, or set "
                    f"mixture.controller to {' or '.join(controllers)}"
                )
        if self.controller == "static" and self.proportions is None:
            raise ValueError("controller: static needs mixture.proportions: set one for each domain, with the sum 1")
        if self.controller == "schedule" and self.schedule_file is None:
            raise ValueError("controller: schedule needs mixture.schedule_file: set it to a YAML file of proportions")
        if self.source == "training":
            self._check_training()
        elif self.measure == "kl":
            raise ValueError("measure: kl is known from training alone: set source: training, or measure: excess_loss")
        if self.initial == "equal" and self.initial_floor:
            raise ValueError(f"initial_floor is {self.initial_floor:g}, which initial: equal does not use: remove it")
        return self

    def _check_training(self) -> None:
        """Raise ValueError if the controller needs what training does not measure."""
        if self.controller == "kl_gap" and self.measure != "kl":
            raise ValueError("source: training has no losses of the teacher: set measure: kl, or source: held_out")
        if self.controller in ("sheared_llama", "doremi_online") and self.reference_losses is None:
            raise ValueError("source: training has no losses of the teacher: set reference_losses, or source: held_out")
        if self.ppl_smoothing:
            raise ValueError(
                f"ppl_smoothing is {self.ppl_smoothing:g}, and source: training has means over an interval: remove it"
            )

    @model_validator(mode="after")
    def _limit_goes_with_policies(self) -> Mixture:
        used = {self.exhaustion, *self.exhaustion_by_domain.values()}
        if "cap" in used and self.max_passes is None:
            raise ValueError("exhaustion: cap needs a limit: set mixture.max_passes, for example 4")
        if "cap" in used and self.loss_weights is not None:
            raise ValueError("loss_weights cannot weight a domain that is at its cap: set exhaustion to cycle or stop")
        if used == {"cycle"} and self.max_passes is not None:
            raise ValueError(
                f"max_passes is {self.max_passes:g}, but every domain cycles: set mixture.exhaustion to cap or stop, "
                "or remove it"
            )
        return self
