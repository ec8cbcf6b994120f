"""Values by domain, as a configuration gives them, in the order of a run's domains."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from ddk_ds.errors import ConfigError
from ddk_ds.mixture.factors import check_proportions


def taking_part(names: Sequence[str], exclude: Sequence[str], *, what: str = "mixture.exclude") -> tuple[str, ...]:
    """The domains of `names` that are drawn at all.

    Raises:
        ConfigError: `exclude` names a domain that the run has not, or leaves none.
    """
    for name in exclude:
        if name not in names:
            raise ConfigError(f"{what}: '{name}' is not a domain of this run: {_hint(str(name), names)}")
    left = tuple(name for name in names if name not in exclude)
    if not left:
        raise ConfigError(f"{what} names every domain of this run ({', '.join(names)}): leave one at least")
    return left


def in_order(
    values: Mapping[str, float], names: Sequence[str], *, what: str, thing: str, default: float | None = None
) -> list[float]:
    """The value of each domain, (N,) in the order of `names`.

    Args:
        what, thing: the key, and what one value of it is called, for messages.
        default: value of a domain that is not named; None: each must be.

    Raises:
        ConfigError: a domain that is not one of `names`, or one of them without a value.
    """
    for name in values:
        if name not in names:
            raise ConfigError(f"{what}: '{name}' is not a domain of this run: {_hint(str(name), names)}")
    for name in names:
        if name not in values and default is None:
            raise ConfigError(f"{what}: '{name}' has no {thing}; name each of {list(names)} once")
    return [float(values.get(name, default or 0.0)) for name in names]


def given_proportions(
    values: Mapping[str, float], names: Sequence[str], exclude: Sequence[str], *, what: str
) -> tuple[float, ...]:
    """Proportions (M,) of the domains that take part, from those of a configuration or file; they sum to 1.

    Raises:
        ConfigError: as `in_order`; numbers that are no proportions; a share of an excluded domain.
    """
    values = {**dict.fromkeys(exclude, 0.0), **values}
    proportions = in_order(values, names, what=what, thing="proportion")
    for name in exclude:
        if values[name] != 0:
            raise ConfigError(
                f"{what}: '{name}' has {values[name]}, and mixture.exclude names it: give it 0, or leave it out of one"
            )
    left = [share for name, share in zip(names, proportions, strict=True) if name not in exclude]
    return tuple(check_proportions(left, num_domains=len(left), what=what).tolist())


def proportions_by_size(names: Sequence[str], sizes: Mapping[str, int]) -> tuple[float, ...]:
    """Proportions (M,) of `names` by their sizes (tokens, say).

    Raises:
        ConfigError: a size that is not > 0.
    """
    for name in names:
        if not sizes[name] > 0:
            raise ConfigError(f"domain '{name}' has size {sizes[name]}: sampling by size needs sizes > 0")
    total = sum(int(sizes[name]) for name in names)
    return tuple(int(sizes[name]) / total for name in names)


def _hint(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{near[0]}'?" if near else f"this run's domains are {', '.join(names)}"
