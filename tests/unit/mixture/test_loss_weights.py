"""Weights of domains in the loss: the objective that all orders of an interval have on average, and what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from ddk_ds.errors import ConfigError
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.loss_weights import make_loss_weights, sample_weights
from tests.unit.mixture.mixture_section import config_with, section

SIZES = {"code": 300, "maths": 100, "prose": 600}
FLOORS = dict.fromkeys(SIZES, 0.1)


def weights_of(controller: str, samples: tuple[int, ...] = (40, 20), **options: Any) -> tuple[float, ...] | None:
    mixture = section(controller, **options)
    return make_loss_weights(mixture, SIZES, make_controller(mixture, SIZES), samples)


def test_a_step_has_the_users_objective_on_average() -> None:
    """All orders of an interval of 6 samples, drawn 3, 1 and 2 times, in steps of 2: by exact enumeration."""
    weights, counts = (
        weights_of("ddk", loss_weights={"code": 0.2, "maths": 0.7, "prose": 0.1}, floors=FLOORS),
        (3, 1, 2),
    )
    assert weights == (0.2, 0.7, 0.1)
    factors = sample_weights(weights, counts, list(SIZES))
    assert factors == pytest.approx([0.4, 4.2, 0.3])
    losses = [5.0, 1.0, 3.0, 7.0, 2.0, 11.0]  # of 3 samples of code, 1 of maths, 2 of prose
    domains = [0, 0, 0, 1, 2, 2]
    objective = 0.2 * (5 + 1 + 3) / 3 + 0.7 * 7 + 0.1 * (2 + 11) / 2
    for place in (0, 2, 4):
        orders = itertools.permutations(range(6))
        steps = [sum(factors[domains[i]] * losses[i] for i in order[place : place + 2]) / 2 for order in orders]
        assert math.fsum(steps) / len(steps) == pytest.approx(objective, rel=1e-12)


def test_weights_by_name() -> None:
    assert weights_of("ddk") is None
    assert weights_of("equal", loss_weights="by_size") == pytest.approx((0.3, 0.1, 0.6))
    assert weights_of("by_size", loss_weights="equal", exclude=["maths"]) == pytest.approx((0.5, 0.0, 0.5))
    assert weights_of("ddk", loss_weights="by_size", floors=FLOORS) == pytest.approx((0.3, 0.1, 0.6))
    assert sample_weights((0.5, 0.0, 0.5), (3, 0, 1), list(SIZES)) == pytest.approx([2 / 3, 0.0, 2.0])
    # Sampled as they weigh, no sample has a factor.
    assert sample_weights((0.3, 0.1, 0.6), (6, 2, 12), list(SIZES)) == pytest.approx([1.0] * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controller": "ddk"}, r"nothing keeps that of 'code' from 0 with controller: ddk: give each domain one"),
        ({"controller": "ddk", "floors": {"code": 0.1, "prose": 0.1}}, "nothing keeps that of 'maths' from 0"),
        (
            {"controller": "ddk", "floors": {**FLOORS, "prose": 0.09}},
            r"'prose' can have as little as 0.09 of an interval",
        ),
        ({"controller": "static", "proportions": {"code": 0.5, "maths": 0.0, "prose": 0.5}}, "as little as 0 of an"),
        ({"controller": "equal", "loss_weights": {"code": 0.5, "maths": 0.0, "prose": 0.5}}, "'maths' has 0: give it"),
        ({"controller": "equal", "loss_weights": {"code": 0.5, "prose": 0.5}}, "'maths' has no proportion"),
        ({"controller": "equal", "loss_weights": {"code": 0.5, "maths": 0.6, "prose": 0.5}}, "whose sum is 1"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        weights_of(**{"loss_weights": "by_size", **options})


def test_what_no_weight_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match="no sample of 'maths'"):
        sample_weights((0.5, 0.25, 0.25), (4, 0, 4), list(SIZES))
    for method in ("ted", "doremi_proxy"):
        more: dict[str, Any] = {"method": method, "ted": {"filters": "f"}}
        mixture = {"loss_weights": "equal", "controller": "equal"}
        with pytest.raises(ConfigError, match=f"mixture.loss_weights: the loss of method: {method} takes no weights"):
            config_with(mixture, **more)
    with pytest.raises(ConfigError, match="loss_weights cannot weight a domain that is at its cap"):
        section("equal", loss_weights="by_size", exhaustion="cap", max_passes=2)
