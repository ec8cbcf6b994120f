"""Controllers decide the proportions of each distillation interval: DDK, its ablations, fixed mixtures.

A controller is a value: the proportions it continues from are handed to it, so it holds no state of its own
beyond its options, and a replay of the ledger through a fresh one gives the same proportions.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from ddk_ds.errors import ConfigError
from ddk_ds.mixture.factors import Values, Vector, check_proportions, initial_factors, smooth_update

CONTROLLER_KINDS = ("ddk", "ddk_no_smoothing", "equal", "by_size", "static")


class Controller(Protocol):
    """Decides the proportions (N,) of the next interval from perplexities; pure."""

    @property
    def name(self) -> str:
        """The kind, as in the configuration."""

    @property
    def uses_teacher(self) -> bool:
        """Whether perplexities are needed at all; else None may be handed in for both models."""

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """Proportions of the first interval."""

    def update(self, proportions: Vector, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """Proportions of the interval after the one that had `proportions`."""

    def state_dict(self) -> dict[str, Any]:
        """All that decides what it returns, as plain JSON."""


@dataclass(frozen=True)
class DDK:
    """The paper's controller: Eq. 1 at the start, Eq. 2 from then on (arXiv 2407.16154)."""

    names: tuple[str, ...]
    alpha: float = 0.5
    ratio_cap: float | None = None
    initial_floor: float = 0.0
    name: ClassVar[str] = "ddk"
    uses_teacher: ClassVar[bool] = True

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """Eq. 1, under the options' cap and floor."""
        return _eq1(self, student_ppl, teacher_ppl)

    def update(self, proportions: Vector, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """Eq. 2, under the options' cap."""
        return smooth_update(
            proportions,
            student_ppl,
            teacher_ppl,
            alpha=self.alpha,
            ratio_cap=self.ratio_cap,
            names=self.names,
        )

    def state_dict(self) -> dict[str, Any]:
        """Kind and options."""
        return _state(self)


@dataclass(frozen=True)
class DDKNoSmoothing:
    """The ablation "w/o FS" (Table 5): Eq. 1 afresh at every interval, cap and floor included."""

    names: tuple[str, ...]
    ratio_cap: float | None = None
    initial_floor: float = 0.0
    name: ClassVar[str] = "ddk_no_smoothing"
    uses_teacher: ClassVar[bool] = True

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """Eq. 1, under the options' cap and floor."""
        return _eq1(self, student_ppl, teacher_ppl)

    def update(self, proportions: Vector, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """Eq. 1 again; the past proportions take no part."""
        return _eq1(self, student_ppl, teacher_ppl)

    def state_dict(self) -> dict[str, Any]:
        """Kind and options."""
        return _state(self)


@dataclass(frozen=True)
class Static:
    """Fixed proportions: equal sampling ("ES", Table 5), by size (the CPT and KD baselines), or the
    user's."""

    names: tuple[str, ...]
    proportions: tuple[float, ...]
    name: str = "static"
    uses_teacher: ClassVar[bool] = False

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """The fixed proportions; perplexities are not looked at."""
        return np.array(self.proportions, np.float64)

    def update(self, proportions: Vector, student_ppl: Values, teacher_ppl: Values) -> Vector:
        """The fixed proportions again."""
        return np.array(self.proportions, np.float64)

    def state_dict(self) -> dict[str, Any]:
        """Kind and proportions."""
        return _state(self)


def make_controller(
    kind: str,
    names: Sequence[str],
    *,
    alpha: float,
    ratio_cap: float | None,
    initial_floor: float,
    proportions: Mapping[str, float] | Sequence[float] | None,
    sizes: Sequence[int],
) -> Controller:
    """The controller of that kind (one of CONTROLLER_KINDS) over the domains `names`.

    Args:
        alpha, ratio_cap, initial_floor: see `factors`; unused by the static kinds.
        proportions: for "static" alone: by domain name, or in the order of `names`.
        sizes: (N,) domain sizes (tokens, say), for "by_size".

    Raises:
        ConfigError: unknown kind, or an option that is missing or out of range.
    """
    domains = tuple(names)
    if not domains or len(set(domains)) < len(domains):
        raise ConfigError(f"domains are {list(domains)}: give at least one, each once")
    if (proportions is None) == (kind == "static"):
        raise ConfigError(
            f"mixture.proportions is {proportions} and the controller is '{kind}': "
            "'static' needs proportions, the others take none"
        )
    controller: Controller
    if kind == "ddk":
        controller = DDK(domains, float(alpha), ratio_cap, float(initial_floor))
        _try_out(controller)
    elif kind == "ddk_no_smoothing":
        controller = DDKNoSmoothing(domains, ratio_cap, float(initial_floor))
        _try_out(controller)
    elif kind == "equal":
        controller = Static(domains, (1 / len(domains),) * len(domains), name=kind)
    elif kind == "by_size":
        controller = Static(domains, _proportions_by_size(domains, sizes), name=kind)
    elif kind == "static":
        assert proportions is not None, "checked above"
        controller = Static(domains, _given_proportions(domains, proportions))
    else:
        near = difflib.get_close_matches(kind, CONTROLLER_KINDS, n=1, cutoff=0)[0]
        raise ConfigError(f"unknown controller '{kind}' (did you mean '{near}'?): one of {', '.join(CONTROLLER_KINDS)}")
    return controller


def _eq1(options: DDK | DDKNoSmoothing, student_ppl: Values, teacher_ppl: Values) -> Vector:
    return initial_factors(
        student_ppl,
        teacher_ppl,
        ratio_cap=options.ratio_cap,
        floor=options.initial_floor,
        names=options.names,
    )


def _state(controller: DDK | DDKNoSmoothing | Static) -> dict[str, Any]:
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(controller).items()}
    return {**options, "name": controller.name}


def _try_out(controller: Controller) -> None:
    """Options out of range raise now and not after the first evaluation: tries both equations."""
    ones = np.ones(len(controller.state_dict()["names"]))
    controller.update(controller.start(ones, ones), ones, ones)


def _proportions_by_size(names: tuple[str, ...], sizes: Sequence[int]) -> tuple[float, ...]:
    if len(sizes) != len(names):
        raise ConfigError(f"{len(sizes)} domain sizes for {len(names)} domains")
    for name, size in zip(names, sizes, strict=True):
        if not size > 0:
            raise ConfigError(f"domain '{name}' has size {size}: sampling by size needs sizes > 0")
    total = sum(int(size) for size in sizes)
    return tuple(int(size) / total for size in sizes)


def _given_proportions(names: tuple[str, ...], proportions: Mapping[str, float] | Sequence[float]) -> tuple[float, ...]:
    if isinstance(proportions, Mapping):
        if odd := sorted(set(names) ^ set(proportions)):
            problem = "has no proportion" if odd[0] in names else "is not a domain of this run"
            raise ConfigError(f"mixture.proportions: '{odd[0]}' {problem}; name each of {list(names)} once")
        proportions = [proportions[name] for name in names]
    checked = check_proportions(proportions, num_domains=len(names), what="mixture.proportions")
    return tuple(checked.tolist())
