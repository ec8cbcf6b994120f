"""Eq. 1 and 2 and the other exponential updates from factors that underflow, against decimals of 60 digits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest

from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.decide import Decision, decide
from tests.unit.mixture.mixture_section import section

SIZES = {"code": 100, "maths": 300}
ONES = np.ones(2)


def exact(alpha: float, measured: Sequence[Sequence[float]], prior: Sequence[float] = (0.5, 0.5)) -> list[Decimal]:
    """Return the proportions after the last measurement, by Eq. 1 and then Eq. 2, in decimals of 60 digits."""
    with localcontext() as context:
        context.prec = 60
        psi = [Decimal(ratio).exp() for ratio in measured[0]]
        factors = [value / sum(psi) for value in psi]
        for ratios in measured[1:]:
            psi = [factor * Decimal(ratio).exp() for factor, ratio in zip(factors, ratios, strict=True)]
            factors = [
                Decimal(alpha) * value / sum(psi) + (1 - Decimal(alpha)) * Decimal(rest)
                for value, rest in zip(psi, prior, strict=True)
            ]
        return factors


def computed(measured: Sequence[Sequence[float]], sizes: dict[str, int] = SIZES, **options: Any) -> Decision:
    """Return the last decision from these ratios; each goes through JSON, as a checkpoint and the ledger hold it."""
    controller, last = make_controller(section(**options), sizes), None
    for interval, ratios in enumerate(measured):
        last = decide(controller, last, np.array(ratios), np.ones(len(ratios)), interval=interval)
        last = Decision(**json.loads(json.dumps(vars(last), allow_nan=False)))
    assert last is not None
    return last


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.125])
@pytest.mark.parametrize(
    "measured",
    [
        [[9000.0, 8000.0], [100.0, 3000.0]],
        [[9000.0, 8000.0], [3000.0, 100.0], [100.0, 3000.0], [1.0, 1.5]],
        [[1.0, 700.0], [700.5, 1.0]],
        [[1.0, 741.0], [740.25, 1.0]],  # a float with fewer digits in between
        [[20.0, 1.0], [1.0, 19.0], [3.0, 4.0]],
    ],
)
def test_a_domain_returns_however_small_it_was(alpha: float, measured: list[list[float]]) -> None:
    found = computed(measured, alpha=alpha)
    for value, log, want in zip(found.proportions, found.log_proportions, exact(alpha, measured), strict=True):
        assert abs(Decimal(value) - want) <= Decimal("1e-11") * want + Decimal("1e-308")
        assert log is not None and abs(Decimal(log) - want.ln()) <= Decimal("1e-11") * max(1, abs(want.ln()))


def test_by_hand() -> None:
    first = computed([[9000.0, 8000.0]])
    assert (first.proportions, first.log_proportions) == ([1.0, 0.0], [0.0, -1000.0])
    assert computed([[9000.0, 8000.0], [100.0, 3000.0]], alpha=0.5).proportions == [0.25, 0.75]
    assert computed([[9000.0, 8000.0], [100.0, 3000.0]], alpha=1.0).proportions == [0.0, 1.0]


def test_a_floor_and_an_excluded_domain_keep_it() -> None:
    """Three domains of which one is never drawn: the other two are those of a run without it."""
    sizes, measured = {"code": 100, "law": 1, "maths": 300}, [[9000.0, 1.0, 8000.0], [100.0, 1.0, 3000.0]]
    found = computed(measured, sizes, alpha=1.0, exclude=("law",), floors={"code": 0.125})
    assert found.proportions == [0.125, 0.0, 0.875] and found.log_proportions[1] is None
    # The floor lifts law from exp(-1000); of the two others one must return in its exact ratio to the other.
    sizes, measured = {**sizes, "code": 100}, [[9000.0, 1.0, 8000.0], [1.0, 1.0, 1000.5]]
    found = computed(measured, sizes, alpha=1.0, floors={"law": 0.25})
    # Before: law 0.25, code and maths share 0.75 by 1 : exp(-1000); psi adds exp(1000.5 - 1) to maths.
    with localcontext() as context:
        context.prec = 60
        psi = [Decimal("0.75"), Decimal("0.25"), Decimal("0.75") * Decimal(-1000 + 999.5).exp()]
        assert psi[1] / sum(psi) < 0.25  # so the floor lifts it again
        want = [Decimal("0.75") * value / (psi[0] + psi[2]) for value in psi]
    np.testing.assert_allclose(found.proportions, [float(want[0]), 0.25, float(want[2])], rtol=1e-12)


@pytest.mark.parametrize("kind", ["sheared_llama", "doremi_online"])
def test_a_faded_domain_returns_by_its_excess_loss(kind: str) -> None:
    """Its rivals' excess of 400 nats twice takes a domain to exp(-800); 801 nats of its own bring it back."""
    options = {"step_size": 2.0, "smoothing": 0.0} if kind == "doremi_online" else {}
    rates = options.get("step_size", 1.0)
    excess = [[0.0, 400.0], [0.0, 400.0], [400.5, 0.0], [400.0, 0.0]]
    measured = [[1.0, 1.0], *np.exp(np.array(excess) / 1.0).tolist()]
    found = computed(measured, controller=kind, **options)
    with localcontext() as context:
        context.prec = 60
        weight = (Decimal(rates) * (Decimal("800.5") - 800)).exp()
    np.testing.assert_allclose(found.proportions[0], float(weight / (1 + weight)), rtol=1e-10)
