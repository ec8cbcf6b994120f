"""The weights of domains in the loss, where they are not the proportions in which the domains are drawn.

Domain i has the share q_i of an interval's samples, and the loss of each of them is multiplied by w_i / q_i
(`mixture.loss_weights` is w). At any place of the interval a sample is one of domain i with the probability q_i, so the
expected loss of a step is sum_i w_i L_i, whatever q is: the proportions decide how often a domain is looked at, w what
is minimised. This is importance sampling, so a domain that is drawn seldom and weighs much makes the gradient noisy:
w_i / q_i is at most w_i / floor_i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from ddk_ds.errors import ConfigError
from ddk_ds.mixture.bounds import included_domains
from ddk_ds.mixture.decide import Controller
from ddk_ds.mixture.domain_vectors import proportions_asked

_KNOWN_BEFORE = ("equal", "by_size", "static", "schedule")
"""Controllers whose proportions depend on nothing that a run measures."""
_LEAST_SAMPLES = 2  # what is due differs from what is drawn by less than one sample, so one of two is drawn


class WeightOptions(Protocol):
    """The options of section `mixture` that loss weights depend on (declared in ddk_ds.config.mixture_options)."""

    exclude: tuple[str, ...]
    floors: dict[str, float]

    @property
    def controller(self) -> str:
        """Kind of the controller, for example "ddk"."""

    @property
    def loss_weights(self) -> str | dict[str, float] | None:
        """Weights of the domains: "by_size", "equal" or a value for each; None: their shares of the samples."""


def make_loss_weights(
    options: WeightOptions, sizes: Mapping[str, int], controller: Controller, interval_samples: Sequence[int]
) -> tuple[float, ...] | None:
    """Return the weights (N,) of the domains, whose sum is 1; 0 for an excluded one. None if the options have none.

    Args:
        sizes: size of each domain in tokens, in the order of the run's domains.
        controller: that of these options.
        interval_samples: samples of each of the run's intervals.

    Raises:
        ConfigError: the weights do not fit the domains, or a domain that has one may get no sample in an interval.
    """
    if options.loss_weights is None:
        return None
    names = included_domains(list(sizes), options.exclude)
    weights = proportions_asked(options.loss_weights, names, sizes, options.exclude, label="mixture.loss_weights")
    by_name = dict(zip(names, weights, strict=True))
    if zero := [name for name, weight in by_name.items() if weight == 0]:
        raise ConfigError(f"mixture.loss_weights: '{zero[0]}' has 0: give it a weight, or name it in mixture.exclude")
    least = _least_shares(options, sizes, controller, len(interval_samples))
    _check_drawn(options, by_name, dict(zip(sizes, least, strict=True)), min(interval_samples))
    return tuple(by_name.get(name, 0.0) for name in sizes)


def _least_shares(
    options: WeightOptions, sizes: Mapping[str, int], controller: Controller, intervals: int
) -> list[float]:
    """Return the least proportion (N,) that a domain can have in any interval."""
    if options.controller not in _KNOWN_BEFORE:
        return [options.floors.get(name, 0.0) for name in sizes]
    ones = np.ones(len(sizes))
    logs = controller.start(ones, ones).logs
    of_intervals = [controller.update(logs, ones, ones, interval=t).proportions for t in range(intervals)]
    least: list[float] = np.min(of_intervals, axis=0).tolist()
    return least


def _check_drawn(
    options: WeightOptions, weights: Mapping[str, float], least: Mapping[str, float], samples: int
) -> None:
    """Raise ConfigError if one of the domains can be without a sample in an interval of `samples` samples."""
    for name in weights:
        if least[name] == 0 and options.controller not in _KNOWN_BEFORE:
            raise ConfigError(
                f"mixture.loss_weights divides by the proportions, and nothing keeps that of '{name}' from 0 with "
                f"controller: {options.controller}: give each domain one of mixture.floors, such as 0.02"
            )
        if least[name] * samples < _LEAST_SAMPLES * (1 - 1e-9):
            raise ConfigError(
                f"mixture.loss_weights: '{name}' can have as little as {least[name]:g} of an interval of {samples} "
                f"samples, which may then have none of it: raise that to {_LEAST_SAMPLES} samples, by its proportion "
                "or floor, mixture.interval_steps, or a number of steps that ends with an interval"
            )


def sample_weights(weights: Sequence[float], counts: Sequence[int], names: Sequence[str]) -> list[float]:
    """Return the factor (N,) of the loss of each domain's samples in an interval: w_i / (counts_i / their sum).

    Raises ConfigError if a domain with a weight has no sample, as after a fork that owes the others.
    """
    total = sum(counts)
    for name, weight, count in zip(names, weights, counts, strict=True):
        if weight and not count:
            raise ConfigError(
                f"mixture.loss_weights: this interval has no sample of '{name}': raise its mixture.floors"
            )
    return [weight * total / count if weight else 0.0 for weight, count in zip(weights, counts, strict=True)]
