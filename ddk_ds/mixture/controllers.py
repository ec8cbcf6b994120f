"""The controller that a run's section `mixture` asks for. docs/methods.md has every kind's formula and source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ddk_ds.mixture.ado import ADO
from ddk_ds.mixture.boltzmann import Boltzmann
from ddk_ds.mixture.bounds import Bounded, floors_in_order, included_domains
from ddk_ds.mixture.ddk import DDK, DDKNoSmoothing
from ddk_ds.mixture.decide import Controller, Known
from ddk_ds.mixture.domain_vectors import (
    proportions_asked,
    proportions_by_size,
    proportions_in_order,
    values_in_order,
)
from ddk_ds.mixture.excess_loss import DoReMiOnline, ShearedLlama
from ddk_ds.mixture.fixed import Scheduled, Static, parse_stages
from ddk_ds.mixture.odm import ODM


class MixtureOptions(Protocol):
    """The options of section `mixture` that controllers have.

    `ddk_ds.config.mixture_options.Mixture` declares their defaults and ranges, and which controller uses which.
    """

    alpha: float
    ratio_cap: float | None
    initial_floor: float
    proportions: dict[str, float] | None
    schedule_file: str | None
    reference_losses: dict[str, float] | None
    step_size: float
    smoothing: float
    temperature: float
    warmup_intervals: int
    history_weight: float
    history_exponent: float
    policy_weight: float
    min_proportion: float
    reward_smoothing: float
    ppl_smoothing: float
    exclude: tuple[str, ...]
    floors: dict[str, float]

    @property
    def controller(self) -> str:
        """Kind of the controller, for example "ddk"."""

    @property
    def source(self) -> str:
        """Source of the measurements: "held_out" or "training"."""

    @property
    def measure(self) -> str:
        """Measure of `controller: kl_gap`: "excess_loss" or "kl"."""

    @property
    def initial(self) -> str:
        """Rule of the first interval of `controller: ddk`: "eq1" (Eq. 1) or "equal" (proportions of 1/N)."""

    @property
    def prior(self) -> str | dict[str, float]:
        """Prior proportions: "equal", "by_size", or a value for each domain."""


def make_controller(options: MixtureOptions, sizes: Mapping[str, int], schedule: Any = None) -> Controller:
    """Return the controller that the section `mixture` describes.

    Args:
        sizes: size of each domain, for example in tokens, in the order of the run's domains.
        schedule: content of `options.schedule_file`, as plain values.

    Raises:
        ConfigError: an option does not fit the run's domains.
    """
    names = included_domains(list(sizes), options.exclude)
    controller = _make_rule(options, names, sizes, schedule)
    if options.exclude or options.floors:
        floors = floors_in_order(options.floors, names, options.exclude)
        controller = Bounded(tuple(sizes), controller, options.exclude, floors)
    # An option that does not fit the number of domains raises now and not after the first evaluation.
    ones = np.ones(len(sizes))
    first = controller.start(ones, ones)
    controller.update(first.logs, ones, ones, interval=1, known=Known(1, 1, first.memory, ones))
    return controller


def _make_rule(options: MixtureOptions, names: tuple[str, ...], sizes: Mapping[str, int], schedule: Any) -> Controller:
    """Return the controller that divides the samples between `names`, the M domains that are drawn."""
    equal = (1 / len(names),) * len(names)
    match options.controller:
        case "ddk":
            return DDK(
                names,
                alpha=options.alpha,
                ratio_cap=options.ratio_cap,
                initial_floor=options.initial_floor,
                initial=options.initial,
                prior=_prior(options, names, sizes),
                ppl_smoothing=options.ppl_smoothing,
            )
        case "ddk_no_smoothing":
            return DDKNoSmoothing(names, options.ratio_cap, options.initial_floor, options.ppl_smoothing)
        case "equal":
            return Static(names, equal, name="equal")
        case "by_size":
            return Static(names, proportions_by_size(names, sizes), name="by_size")
        case "static":
            assert options.proportions is not None, "the section requires proportions with controller: static"
            label = "mixture.proportions"
            proportions = proportions_in_order(options.proportions, list(sizes), options.exclude, label=label)
            return Static(names, proportions, name="static")
        case "schedule":
            source = str(options.schedule_file)
            return Scheduled(names, parse_stages(schedule, list(sizes), options.exclude, source=source))
        case "sheared_llama":
            prior, reference = _prior(options, names, sizes), _reference_losses(options, sizes)
            return ShearedLlama(names, prior, reference, options.ppl_smoothing, options.source)
        case "doremi_online":
            return DoReMiOnline(
                names,
                prior=_prior(options, names, sizes),
                reference=_reference_losses(options, sizes),
                ppl_smoothing=options.ppl_smoothing,
                source=options.source,
                step_size=options.step_size,
                smoothing=options.smoothing,
            )
        case "ado" | "odm" | "loss_softmax" | "kl_gap":
            return _make_newer_rule(options, names, _prior(options, names, sizes) or equal)
    raise AssertionError(f"the section has controller {options.controller}, which nothing here makes")


def _make_newer_rule(options: MixtureOptions, names: tuple[str, ...], prior: tuple[float, ...]) -> Controller:
    """Return the rule of the newer kinds, which can also decide by what training measures."""
    if options.controller == "ado":
        return ADO(
            names,
            prior=prior,
            warmup_intervals=options.warmup_intervals,
            history_weight=options.history_weight,
            policy_weight=options.policy_weight,
            history_exponent=options.history_exponent,
            min_proportion=options.min_proportion,
            source=options.source,
        )
    if options.controller == "odm":
        return ODM(names, prior, options.reward_smoothing, options.source)
    return Boltzmann(
        names,
        prior,
        temperature=options.temperature,
        measure=options.measure if options.controller == "kl_gap" else "loss",
        ppl_smoothing=options.ppl_smoothing,
        source=options.source,
        name=options.controller,
    )


def _prior(options: MixtureOptions, names: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[float, ...] | None:
    """Return the prior proportions (M,) of `names`; None for equal ones, which the controllers compute as 1/M."""
    if options.prior == "equal":
        return None
    return proportions_asked(options.prior, names, sizes, options.exclude, label="mixture.prior")


def _reference_losses(options: MixtureOptions, sizes: Mapping[str, int]) -> tuple[float, ...] | None:
    """Return the reference losses (M,), in nats per token, of the domains that are drawn.

    None if the configuration gives none: the teacher's losses are the references then. The keys of `sizes` give the
    order of the domains.
    """
    if options.reference_losses is None:
        return None
    # An excluded domain can have a reference, which is not used.
    losses = {**dict.fromkeys(options.exclude, 0.0), **options.reference_losses}
    ordered = values_in_order(losses, list(sizes), label="mixture.reference_losses", quantity="loss")
    return tuple(loss for name, loss in zip(sizes, ordered, strict=True) if name not in options.exclude)
