"""Domain discrepancy factors: Eq. 1 and Eq. 2 of arXiv 2407.16154 in the log domain; bounds and a prior optional."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ddk_ds.errors import ConfigError, DataError

Vector = NDArray[np.float64]
Values = Sequence[float | None] | Vector | None


def check_perplexities(values: Values, *, model: str, names: Sequence[str] | None = None) -> Vector:
    """The perplexities of one model as (N,) float64.

    Args:
        values: one perplexity a domain.
        model: "student" or "teacher", for the message.
        names: the domains' names; N where given.

    Raises:
        DataError: missing, NaN, infinite, zero or negative; the message holds the domain's name and the
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
                f"the {model}'s perplexity of {_domain(names, i)} is {shown}, not a positive finite "
                f"number: has the {model} diverged, or does the domain's validation split hold no token?"
            )
    return np.array(values, np.float64)


def discrepancy(student_ppl: Values, teacher_ppl: Values, *, names: Sequence[str] | None = None) -> float:
    """The largest l_S / l_T - 1 over the domains: Algorithm 1 may stop when it falls under a threshold."""
    return float(_ratios(student_ppl, teacher_ppl, None, names).max() - 1)


def initial_factors(
    student_ppl: Values,
    teacher_ppl: Values,
    *,
    ratio_cap: float | None = None,
    floor: float = 0.0,
    names: Sequence[str] | None = None,
) -> Vector:
    """Eq. 1 of arXiv 2407.16154: r_0 = softmax(l_S / l_T), (N,), sums to 1.

    Args:
        student_ppl, teacher_ppl: (N,) perplexities l_S, l_T.
        ratio_cap: upper bound on l_S / l_T before exp; None is the paper.
        floor: lower bound on every proportion, r = floor + (1 - N floor) softmax; 0 is the paper.
        names: the domains' names, for messages.

    Raises:
        DataError: a perplexity is missing or not a positive finite number.
        ConfigError: ratio_cap or floor is out of range.
    """
    ratios = _ratios(student_ppl, teacher_ppl, ratio_cap, names)
    num_domains = len(ratios)
    if not (floor >= 0 and floor * num_domains <= 1 + 1e-12):  # 1/N times N may round up
        raise ConfigError(
            f"mixture.initial_floor is {floor} for {num_domains} domains: give a number between 0 and 1/{num_domains}"
        )
    return floor + max(0.0, 1 - num_domains * floor) * _softmax(ratios)


def smooth_update(
    factors: Sequence[float] | Vector,
    student_ppl: Values,
    teacher_ppl: Values,
    *,
    alpha: float,
    ratio_cap: float | None = None,
    prior: Sequence[float] | Vector | None = None,
    names: Sequence[str] | None = None,
) -> Vector:
    """Eq. 2 of arXiv 2407.16154.

    psi = r_t exp(l_S / l_T); r_{t+1} = alpha psi / sum(psi) + (1 - alpha) / N, (N,), sums to 1.

    Args:
        factors: (N,) r_t, non-negative, sums to 1; zeros are legal (their psi is 0).
        alpha: smoothing coefficient, 0..1; every domain keeps at least (1 - alpha) / N.
        student_ppl, teacher_ppl, ratio_cap, names: as in `initial_factors`.
        prior: (N,) proportions in place of 1/N; None is the paper.

    Raises:
        DataError: a perplexity is missing or not a positive finite number.
        ConfigError: alpha, ratio_cap, prior or factors is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"mixture.alpha is {alpha}: give a number between 0 and 1")
    ratios = _ratios(student_ppl, teacher_ppl, ratio_cap, names)
    current = check_proportions(factors, num_domains=len(ratios), what="the factors r_t")
    smoothed = alpha * reweighted(current, ratios - ratios.max())
    if prior is None:
        return smoothed + (1 - alpha) / len(ratios)
    return smoothed + (1 - alpha) * check_proportions(prior, num_domains=len(ratios), what="mixture.prior")


def reweighted(proportions: Vector, exponents: Vector) -> Vector:
    """proportions * exp(exponents), (N,), divided by its sum; where a proportion is 0, it stays 0."""
    log_proportions = np.log(proportions, out=np.full_like(proportions, -np.inf), where=proportions > 0)
    return _softmax(log_proportions + exponents)


def check_proportions(values: Sequence[float] | Vector, *, num_domains: int, what: str) -> Vector:
    """(N,) float64 proportions; `what` names them in the message.

    Raises:
        ConfigError: another length, a value that is negative or not finite, or a sum that isn't 1 within
        1e-6.
    """
    proportions = np.asarray(values, np.float64)
    if proportions.shape != (num_domains,):
        raise ConfigError(f"{what}: {proportions.size} values for {num_domains} domains")
    total = math.fsum(proportions)
    if not (np.isfinite(proportions).all() and (proportions >= 0).all() and abs(total - 1) <= 1e-6):
        raise ConfigError(f"{what} are {proportions.tolist()} (sum {total}): give numbers >= 0 whose sum is 1")
    return proportions


def is_nearly_one_hot(proportions: Sequence[float] | Vector, threshold: float = 0.9) -> bool:
    """Whether one of several domains takes more than `threshold` of the samples."""
    return len(proportions) > 1 and float(np.max(proportions)) > threshold


def one_hot_warning(proportions: Sequence[float] | Vector, names: Sequence[str], threshold: float = 0.9) -> str | None:
    """The warning where r_0 is nearly one-hot, else None.

    Eq. 1 exponentiates the ratio of perplexities and has no floor: a weak student's ratios of 5 against 40
    leave the other domains nothing in the first interval.
    """
    if not is_nearly_one_hot(proportions, threshold):
        return None
    top = int(np.argmax(proportions))
    return (
        f"the first interval takes {float(proportions[top]):.1%} of its samples from domain '{names[top]}': "
        "Eq. 1 exponentiates the ratio of perplexities, and this student's ratios are far apart. To spread "
        "the samples, set mixture.ratio_cap (a bound on the ratio before exp) or mixture.initial_floor (a "
        "least proportion of every domain)"
    )


def _ratios(student_ppl: Values, teacher_ppl: Values, ratio_cap: float | None, names: Sequence[str] | None) -> Vector:
    """l_S / l_T (N,), capped."""
    student = check_perplexities(student_ppl, model="student", names=names)
    teacher = check_perplexities(teacher_ppl, model="teacher", names=names)
    if len(student) != len(teacher):
        raise DataError(f"{len(student)} perplexities of the student, {len(teacher)} of the teacher")
    with np.errstate(over="ignore"):
        ratios = student / teacher
    if not np.isfinite(ratios).all():
        i = int(np.flatnonzero(~np.isfinite(ratios))[0])
        raise DataError(f"student {student[i]} / teacher {teacher[i]} perplexity of {_domain(names, i)} overflows")
    if ratio_cap is None:
        return ratios
    if not (math.isfinite(ratio_cap) and ratio_cap > 0):
        raise ConfigError(f"mixture.ratio_cap is {ratio_cap}: give a number > 0, or null for no cap")
    return np.minimum(ratios, ratio_cap)


def _softmax(exponents: Vector) -> Vector:
    weights: Vector = np.exp(exponents - exponents.max())
    return weights / math.fsum(weights)


def _domain(names: Sequence[str] | None, i: int) -> str:
    return f"domain {i}" if names is None else f"domain '{names[i]}'"
