"""Adaptive Data Optimization (ADO, arXiv 2410.11820): domains by how fast their power laws say that the loss falls.

The paper decides at every step. Here an interval of n steps counts as n of its steps with the same law and policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ddk_ds.errors import ConfigError
from ddk_ds.mixture.bounds import raise_to_floors
from ddk_ds.mixture.decide import NOTHING_ELSE, Known, controller_state, labelled, recalled
from ddk_ds.mixture.domain_vectors import Factors, Values, Vector, check_perplexities

OBSERVATIONS = 64
"""Most observations of a domain's loss that its law is fitted to: the last ones."""
_EXPONENTS = np.linspace(0.01, 0.8, 80)  # the largest is that of the authors' code
_FINER = np.linspace(-1, 1, 21)


class Law(NamedTuple):
    """The power law of a domain's loss after n tokens of all domains: irreducible + scale n^-exponent, in nats."""

    irreducible: float
    scale: float
    exponent: float

    def speed(self, tokens: int) -> float:
        """Return n times how fast the loss falls after n `tokens`: -n dL/dn = exponent scale n^-exponent."""
        return float(self.exponent * self.scale * float(tokens) ** -self.exponent)


def fit_law(tokens: Sequence[int], losses: Sequence[float] | Vector) -> Law | None:
    """Return the power law with the least sum of squared errors; None if none that falls does.

    For each exponent the other two follow from linear least squares; the exponents are a grid from 0.01 to 0.8, and
    finer ones about its best. The irreducible loss is >= 0.

    Args:
        tokens: (T,) rising numbers > 0, of all domains.
        losses: (T,) nats a token.
    """
    relative = np.asarray(tokens, np.float64) / tokens[-1]
    observed = np.asarray(losses, np.float64)
    exponents, width = _EXPONENTS, _EXPONENTS[1] - _EXPONENTS[0]
    for _ in range(3):
        errors, irreducible, scales = _least_squares(relative, observed, exponents)
        best = int(errors.argmin())
        if not np.isfinite(errors[best]):
            return None
        exponent = float(exponents[best])
        law = Law(float(irreducible[best]), float(scales[best]) * float(tokens[-1]) ** exponent, exponent)
        exponents, width = np.clip(exponent + width * _FINER, _EXPONENTS[0], _EXPONENTS[-1]), width * 0.1
    return law


def _least_squares(relative: Vector, observed: Vector, exponents: Vector) -> tuple[Vector, Vector, Vector]:
    """Return the error, the irreducible loss and the scale of the best law with each exponent, (A,) each.

    The error is infinite where the best one does not fall. `relative` (T,) are tokens divided by the last of them.
    """
    powers = relative ** -exponents[:, None]
    mean_power, mean_loss = powers.mean(1), observed.mean()
    centred = powers - mean_power[:, None]
    scales = centred @ (observed - mean_loss) / (centred**2).sum(1)
    irreducible = mean_loss - scales * mean_power
    scales = np.where(irreducible < 0, powers @ observed / (powers**2).sum(1), scales)
    irreducible = np.maximum(irreducible, 0.0)
    errors = ((irreducible[:, None] + scales[:, None] * powers - observed) ** 2).sum(1)
    return np.where(scales > 0, errors, np.inf), irreducible, scales


@dataclass(frozen=True)
class ADO:
    """ADO's data policy. mu is the prior, L_k the law of domain k's loss after n tokens, t the step.

    rho_k = mu_k h_k^s (-dL_k/dn) divided by the sum, no less than delta_min; pi = gamma_2 rho + (1 - gamma_2) mean of
    rho before t; h = gamma_1 pi + (1 - gamma_1) h at each step. In the first intervals pi is mu.
    """

    names: tuple[str, ...]
    prior: tuple[float, ...]
    """(N,) mu."""
    warmup_intervals: int
    """First intervals, in which pi is mu: as many observations has the first fit."""
    history_weight: float
    """gamma_1, for a step."""
    policy_weight: float
    """gamma_2."""
    history_exponent: float
    """s."""
    min_proportion: float
    """delta_min, of rho."""
    source: str
    """Where the losses come from."""
    name: ClassVar[str] = "ado"
    uses_teacher: ClassVar[bool] = False
    ppl_smoothing: ClassVar[float] = 0.0

    def spreading(self, interval: int) -> tuple[str, ...]:
        """Return delta_min, which bounds what the preference takes from a domain."""
        return ("min_proportion",)

    def start(self, student_ppl: Values, teacher_ppl: Values) -> Factors:
        """Return the prior (N,); the loss after no token is no observation.

        Raises:
            ConfigError: N domains of `min_proportion` are more than 1.
        """
        if self.min_proportion * len(self.names) > 1 + 1e-12:
            raise ConfigError(
                f"mixture.min_proportion is {self.min_proportion:g} for {len(self.names)} domains: give a number "
                f"between 0 and 1/{len(self.names)}"
            )
        prior = list(self.prior)
        memory = {"step": 0, "tokens": [], "losses": [], "laws": [None] * len(prior)}
        memory |= {"history": prior, "preference": prior, "mean_preference": prior}
        return replace(Factors.of(np.array(prior)), memory=labelled(memory, self.name, self.names))

    def update(
        self, logs: Vector, student_ppl: Values, teacher_ppl: Values, *, interval: int, known: Known = NOTHING_ELSE
    ) -> Factors:
        """Return the policy pi (N,) of the interval, after one more observation of each domain's loss."""
        memory = recalled(known.memory, self.name, self.names)
        losses = np.log(check_perplexities(student_ppl, model="student", names=self.names))
        memory = self._advanced(memory, np.exp(logs), losses, known)
        if len(memory["tokens"]) < self.warmup_intervals:
            return replace(Factors.of(np.array(self.prior)), memory=memory)
        found = [fit_law(memory["tokens"], of_domain) for of_domain in zip(*memory["losses"], strict=True)]
        laws = [last if law is None else list(law) for law, last in zip(found, memory["laws"], strict=True)]
        memory["laws"] = laws
        preference = self._preference(laws, np.array(memory["history"]), known.tokens)
        memory["preference"] = preference.tolist()
        mean = np.array(memory["mean_preference"])
        policy = self.policy_weight * preference + (1 - self.policy_weight) * mean
        return replace(Factors.of(policy / policy.sum()), memory=memory)

    def state_dict(self) -> dict[str, Any]:
        """Return the kind and the options."""
        return controller_state(self)

    def _advanced(self, memory: dict[str, Any], policy: Vector, losses: Vector, known: Known) -> dict[str, Any]:
        """Return the memory after an interval that was drawn by `policy` (N,), with the losses (N,) at its end."""
        step, last = known.step, memory["step"]
        old = (1 - self.history_weight) ** (step - last)
        history = old * np.array(memory["history"]) + (1 - old) * policy
        share = last / step if step else 0.0
        tokens, rows = memory["tokens"], memory["losses"]
        if known.tokens > (tokens or [0])[-1]:  # the law divides by tokens, and they rise from border to border
            tokens, rows = [*tokens, known.tokens], [*rows, losses.tolist()]
        mean = share * np.array(memory["mean_preference"]) + (1 - share) * np.array(memory["preference"])
        return {
            **memory,
            "step": step,
            "tokens": tokens[-OBSERVATIONS:],
            "losses": rows[-OBSERVATIONS:],
            "history": history.tolist(),
            "mean_preference": mean.tolist(),
        }

    def _preference(self, laws: Sequence[Sequence[float] | None], history: Vector, tokens: int) -> Vector:
        """Return rho (N,). A domain whose loss has never fallen has no law: its speed is the mean of the others'."""
        speeds = np.array([np.nan if law is None else Law(*law).speed(tokens) for law in laws])
        if np.isnan(speeds).all():
            return np.array(self.prior)
        speeds = np.where(np.isnan(speeds), np.nanmean(speeds), speeds)
        weights = np.array(self.prior) * history**self.history_exponent * speeds
        floors = [self.min_proportion] * len(weights)
        return raise_to_floors(floors, Factors.of(weights / weights.sum())).proportions
