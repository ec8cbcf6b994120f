"""Vectors over a run's domains: perplexities, proportions and options, checked and in one order."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddk_ds.errors import ConfigError, DataError

Vector = NDArray[np.float64]
Values = Sequence[float | None] | Vector | None
"""Perplexities of one model, (N,); None for a model that was not measured."""
Memory = dict[str, Any] | None
"""What a controller keeps from one decision to the next, as plain JSON; None if it keeps nothing."""


def check_perplexities(values: Values, *, model: str, names: Sequence[str] | None = None) -> Vector:
    """Return one model's perplexities as a vector (N,) of float64.

    Args:
        values: one perplexity for each domain.
        model: "student" or "teacher"; error messages name it.
        names: names of the N domains, or None; with names there must be one perplexity for each.

    Raises:
        DataError: a perplexity is missing, NaN, infinite, zero or negative; the message has the domain's name and the
            value.
    """
    if values is None:
        raise DataError(f"the {model}'s perplexities are missing: measure the {model} on every domain first")
    values = list(values)
    num_domains = len(values) if names is None else len(names)
    if num_domains == 0:
        raise DataError(f"the {model}'s perplexities are empty: there must be at least one domain")
    for i in range(max(num_domains, len(values))):
        value = values[i] if i < len(values) else None
        if i >= num_domains:
            raise DataError(f"the {model} has {len(values)} perplexities for {num_domains} domains")
        if value is None or not (math.isfinite(value) and value > 0):
            shown = "missing" if value is None else repr(float(value))
            raise DataError(
                f"the {model}'s perplexity of {domain_label(names, i)} is {shown}, not a positive finite "
                f"number: has the {model} diverged, or does the domain's validation split hold no token?"
            )
    return np.array(values, np.float64)


def check_divergences(values: Values, *, names: Sequence[str]) -> Vector:
    """Return the divergences from the teacher as a vector (N,) of float64, in nats.

    Raises:
        DataError: they are missing, or one is not finite.
    """
    if values is None or len(values) != len(names):
        raise DataError("the divergences from the teacher are missing: they are measured in training alone")
    for name, value in zip(names, values, strict=True):
        if value is None or not math.isfinite(value):
            raise DataError(f"the divergence from the teacher of domain '{name}' is {value}, not a finite number")
    return np.array(values, np.float64)


def domain_label(names: Sequence[str] | None, i: int) -> str:
    """Return the words for domain `i` in a message: its name in quotes, or its number where there are no names."""
    return f"domain {i}" if names is None else f"domain '{names[i]}'"


def check_proportions(values: Sequence[float] | Vector, *, num_domains: int, label: str) -> Vector:
    """Return `values` as (N,) float64 proportions; `label` names them in the message.

    Raises:
        ConfigError: there are not N values, a value is negative or not finite, or the sum is not 1 within 1e-6.
    """
    proportions = np.asarray(values, np.float64)
    if proportions.shape != (num_domains,):
        raise ConfigError(f"{label}: {proportions.size} values for {num_domains} domains")
    total = math.fsum(proportions)
    if not (np.isfinite(proportions).all() and (proportions >= 0).all() and abs(total - 1) <= 1e-6):
        raise ConfigError(f"{label} are {proportions.tolist()} (sum {total}): give numbers >= 0 whose sum is 1")
    return proportions


def proportions_in_order(
    values: Mapping[str, float], names: Sequence[str], exclude: Sequence[str], *, label: str
) -> tuple[float, ...]:
    """Return the proportions (M,) of the domains that are not excluded, in the order of `names`.

    Args:
        label: the key or file that gives the values, for messages.

    Raises:
        ConfigError: a domain is unknown or has no value, an excluded domain has a proportion above 0, a value is
            negative or not finite, or the sum is not 1.
    """
    values = {**dict.fromkeys(exclude, 0.0), **values}
    proportions = values_in_order(values, names, label=label, quantity="proportion")
    for name in exclude:
        if values[name] != 0:
            raise ConfigError(
                f"{label}: '{name}' has {values[name]}, and mixture.exclude names it: set it to 0, or do not exclude it"
            )
    included = [value for name, value in zip(names, proportions, strict=True) if name not in exclude]
    return tuple(check_proportions(included, num_domains=len(included), label=label).tolist())


def values_in_order(
    values: Mapping[str, float], names: Sequence[str], *, label: str, quantity: str, default: float | None = None
) -> list[float]:
    """Return the value of each domain, (N,), in the order of `names`.

    Args:
        label: the key or file that gives the values, for messages.
        quantity: the word for one value, for messages.
        default: value of a domain that is not named; None: every domain must be named.

    Raises:
        ConfigError: a domain is not one of `names`, or one of `names` has no value.
    """
    check_domains(values, names, label=label)
    for name in names:
        if name not in values and default is None:
            raise ConfigError(f"{label}: '{name}' has no {quantity}; name each of {list(names)} once")
    return [float(values.get(name, default or 0.0)) for name in names]


def check_domains(domains: Iterable[str], names: Sequence[str], *, label: str) -> None:
    """Raise ConfigError if one of `domains` is not in `names`; `label` is the key or file that lists `domains`."""
    for name in domains:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"this run's domains are {', '.join(names)}"
            raise ConfigError(f"{label}: '{name}' is not a domain of this run: {hint}")


def proportions_by_size(names: Sequence[str], sizes: Mapping[str, int]) -> tuple[float, ...]:
    """Return the share (M,) of each domain of `names` in the sum of their sizes.

    Args:
        sizes: size of each domain, for example in tokens; it can have further domains.

    Raises:
        ConfigError: a size is not > 0.
    """
    for name in names:
        if not sizes[name] > 0:
            raise ConfigError(f"domain '{name}' has size {sizes[name]}: sampling by size needs sizes > 0")
    total = sum(int(sizes[name]) for name in names)
    return tuple(int(sizes[name]) / total for name in names)


def proportions_asked(
    asked: str | Mapping[str, float],
    names: Sequence[str],
    sizes: Mapping[str, int],
    exclude: Sequence[str],
    *,
    label: str,
) -> tuple[float, ...]:
    """Return the proportions (M,) of `names` that an option asks for: "equal", "by_size", or a value for each domain.

    Args:
        sizes: size of each domain, those in `exclude` too.
        label: the option's key, for messages.

    Raises:
        ConfigError: as `proportions_by_size` or `proportions_in_order` raises.
    """
    if asked == "equal":
        return (1 / len(names),) * len(names)
    if isinstance(asked, str):
        return proportions_by_size(names, sizes)
    return proportions_in_order(asked, list(sizes), exclude, label=label)


@dataclass(frozen=True, eq=False)
class Factors:
    """Proportions and their logs: where a proportion underflows to 0, its log still says how small it is.

    Without it a domain whose first proportion is exp(-1000) could never return (Eq. 2 multiplies).
    """

    proportions: Vector
    """(N,), sums to 1."""
    logs: Vector
    """(N,); -inf only where a proportion is 0 by definition, for example an excluded domain's."""
    memory: Memory = None
    """What the controller keeps for its next decision."""

    @classmethod
    def of(cls, proportions: Vector, logs: Vector | None = None) -> Factors:
        """Return the factors of `proportions` (N,); `logs` (N,) are used only where a proportion is too small a float.

        Without `logs` such a proportion is what it says.
        """
        if logs is None:
            logs = np.full(len(proportions), -np.inf)
        least = np.finfo(np.float64).tiny  # smaller floats have fewer digits
        return cls(proportions, np.log(proportions, out=logs.copy(), where=~(proportions < least)))


def softmax(exponents: Vector) -> Factors:
    """Return exp(exponents) divided by its sum, (N,), without overflow; an exponent of -inf gives 0."""
    shifted = exponents - exponents.max()
    weights = np.exp(shifted)
    total = math.fsum(weights)
    return Factors.of(weights / total, shifted - math.log(total))


def mixed(weight: float, factors: Factors, rest: float | Vector) -> Factors:
    """Return weight * factors + rest, (N,)."""
    rests = np.broadcast_to(rest, factors.logs.shape)
    with np.errstate(divide="ignore"):  # the log of a weight or rest of 0
        logs = np.logaddexp(np.log(weight) + factors.logs, np.log(rests))
    return Factors.of(weight * factors.proportions + rests, logs)


def perplexity(mean_loss: ArrayLike) -> Vector:
    """Return exp(mean loss per token, in nats): infinity above 709.78, where float64 has no number."""
    with np.errstate(over="ignore"):
        return np.exp(np.asarray(mean_loss, np.float64))
