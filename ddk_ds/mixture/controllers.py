"""The controller of a run, made from its options. docs/methods.md has every kind's formula and source."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ddk_ds.errors import ConfigError
from ddk_ds.mixture.bounds import Bounded, given_proportions, in_order, proportions_by_size, taking_part
from ddk_ds.mixture.ddk import DDK, DDKNoSmoothing
from ddk_ds.mixture.decide import Controller
from ddk_ds.mixture.excess_loss import DoReMiOnline, ShearedLlama
from ddk_ds.mixture.fixed import Scheduled, Static, parse_stages

CONTROLLER_KINDS = (
    "ddk",
    "ddk_no_smoothing",
    "equal",
    "by_size",
    "static",
    "schedule",
    "sheared_llama",
    "doremi_online",
)


@dataclass(frozen=True)
class ControllerOptions:
    """The options of section `mixture` that controllers have, under the same names; each default is the paper's.

    An option of other kinds than the one that is made is not looked at.
    """

    alpha: float = 0.5
    ratio_cap: float | None = None
    initial: str = "eq1"
    initial_floor: float = 0.0
    prior: str | Mapping[str, float] = "equal"
    proportions: Mapping[str, float] | Sequence[float] | None = None
    """By domain, or in the order of the domains."""
    schedule_file: str | None = None
    reference_losses: Mapping[str, float] | None = None
    step_size: float = 1.0
    smoothing: float = 1e-3
    ppl_smoothing: float = 0.0
    exclude: Sequence[str] = ()
    floors: Mapping[str, float] = field(default_factory=dict)


def make_controller(
    kind: str, names: Sequence[str], options: ControllerOptions, *, sizes: Sequence[int], schedule: Any = None
) -> Controller:
    """The controller of that kind (one of CONTROLLER_KINDS) over the domains `names`.

    Args:
        sizes: (N,) domain sizes (tokens, say), for what goes by size.
        schedule: content of `options.schedule_file`, as plain values.

    Raises:
        ConfigError: unknown kind, or an option that is missing or out of range.
    """
    domains = tuple(names)
    if not domains or len(set(domains)) < len(domains):
        raise ConfigError(f"domains are {list(domains)}: give at least one, each once")
    if kind not in CONTROLLER_KINDS:
        near = difflib.get_close_matches(kind, CONTROLLER_KINDS, n=1, cutoff=0)[0]
        raise ConfigError(f"unknown controller '{kind}' (did you mean '{near}'?): one of {', '.join(CONTROLLER_KINDS)}")
    for key, needed_by, value in (
        ("proportions", "static", options.proportions),
        ("schedule_file", "schedule", options.schedule_file),
    ):
        if (value is None) == (kind == needed_by):
            raise ConfigError(
                f"mixture.{key} is {value} and the controller is '{kind}': '{needed_by}' needs {key}, "
                "the others take none"
            )
    if len(sizes) != len(domains):
        raise ConfigError(f"{len(sizes)} domain sizes for {len(domains)} domains")
    part = taking_part(domains, options.exclude)
    controller = _make_rule(kind, part, domains, options, dict(zip(domains, sizes, strict=True)), schedule)
    if options.exclude or options.floors:
        controller = Bounded(domains, controller, tuple(options.exclude), _floors(part, options))
    _try_out(controller, len(domains))
    return controller


def _make_rule(
    kind: str,
    names: tuple[str, ...],
    all_names: tuple[str, ...],
    options: ControllerOptions,
    sizes: Mapping[str, int],
    schedule: Any,
) -> Controller:
    """The controller of `names`, the domains that take part."""
    smoothing = float(options.ppl_smoothing)
    cap, floor = options.ratio_cap, float(options.initial_floor)
    match kind:
        case "ddk":
            prior = _prior(names, all_names, options, sizes)
            return DDK(names, float(options.alpha), cap, floor, options.initial, prior, smoothing)
        case "ddk_no_smoothing":
            return DDKNoSmoothing(names, cap, floor, smoothing)
        case "equal":
            return Static(names, (1 / len(names),) * len(names), name=kind)
        case "by_size":
            return Static(names, proportions_by_size(names, sizes), name=kind)
        case "static":
            return Static(names, _static_proportions(all_names, options))
        case "schedule":
            source = str(options.schedule_file)
            return Scheduled(names, parse_stages(schedule, all_names, options.exclude, source=source))
    prior, reference = _prior(names, all_names, options, sizes), _references(names, all_names, options)
    if kind == "sheared_llama":
        return ShearedLlama(names, prior, reference, smoothing)
    return DoReMiOnline(names, prior, reference, smoothing, float(options.step_size), float(options.smoothing))


def _prior(
    names: tuple[str, ...], all_names: tuple[str, ...], options: ControllerOptions, sizes: Mapping[str, int]
) -> tuple[float, ...] | None:
    """(M,); None: equal, which is Eq. 2's own arithmetic."""
    if isinstance(options.prior, Mapping):
        return given_proportions(options.prior, all_names, options.exclude, what="mixture.prior")
    if options.prior not in ("equal", "by_size"):
        raise ConfigError(f"mixture.prior is '{options.prior}': give equal, by_size, or a proportion for each domain")
    return None if options.prior == "equal" else proportions_by_size(names, sizes)


def _static_proportions(names: tuple[str, ...], options: ControllerOptions) -> tuple[float, ...]:
    given, what = options.proportions, "mixture.proportions"
    assert given is not None, "checked by make_controller"
    if not isinstance(given, Mapping):
        if len(given) != len(names):
            raise ConfigError(f"{what}: {len(given)} values for {len(names)} domains")
        given = dict(zip(names, given, strict=True))
    return given_proportions(given, names, options.exclude, what=what)


def _references(
    names: tuple[str, ...], all_names: tuple[str, ...], options: ControllerOptions
) -> tuple[float, ...] | None:
    """(M,) nats a token; None: the teacher's. An excluded domain may have one, which nothing looks at."""
    if options.reference_losses is None:
        return None
    what = "mixture.reference_losses"
    losses = {**dict.fromkeys(options.exclude, 0.0), **options.reference_losses}
    by_name = dict(zip(all_names, in_order(losses, all_names, what=what, thing="loss"), strict=True))
    for name, loss in by_name.items():
        if not (math.isfinite(loss) and loss >= 0):
            raise ConfigError(f"{what}: '{name}' has {loss}: give a loss in nats a token, >= 0")
    return tuple(by_name[name] for name in names)


def _floors(names: tuple[str, ...], options: ControllerOptions) -> tuple[float, ...]:
    """(M,) least proportions; empty where none is given."""
    if not options.floors:
        return ()
    for name in options.exclude:
        if name in options.floors:
            raise ConfigError(f"mixture.floors: '{name}' is in mixture.exclude too: leave it out of one")
    floors = in_order(options.floors, names, what="mixture.floors", thing="floor", default=0.0)
    if not all(floor >= 0 for floor in floors) or math.fsum(floors) > 1 + 1e-12:
        raise ConfigError(
            f"mixture.floors are {dict(options.floors)} (sum {math.fsum(floors):g}): give numbers >= 0 whose sum is at "
            "most 1"
        )
    return tuple(floors)


def _try_out(controller: Controller, num_domains: int) -> None:
    """Options out of range raise now and not after the first evaluation: tries start and update."""
    if not 0 <= controller.ppl_smoothing < 1:
        raise ConfigError(f"mixture.ppl_smoothing is {controller.ppl_smoothing}: give a number from 0 to under 1")
    ones = np.ones(num_domains)
    controller.update(controller.start(ones, ones), ones, ones, interval=1)
