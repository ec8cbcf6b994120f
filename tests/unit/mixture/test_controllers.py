"""The controllers: the proportions that each returns, its state, and the options that it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from ddk_ds.config.mixture_options import ControllerKind
from ddk_ds.errors import ConfigError, DataError
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.ddk import DDK
from ddk_ds.mixture.decide import Controller
from ddk_ds.mixture.domain_vectors import Factors
from ddk_ds.mixture.excess_loss import DoReMiOnline, ShearedLlama
from tests.unit.mixture.mixture_section import section

NAMES = ("code", "maths", "prose")
STUDENT, TEACHER = [9.0, 30.0, 12.0], [3.0, 12.0, 10.0]


SCHEDULE = [
    {"from_interval": 0, "proportions": {"code": 0.5, "maths": 0.3, "prose": 0.2}},
    {"from_interval": 3, "proportions": {"code": 0, "maths": 0.25, "prose": 0.75}},
]


PROPORTIONS = {"code": 0.5, "maths": 0.3, "prose": 0.2}


def build(kind: str, sizes: Sequence[int] = (100, 300, 600), schedule: Any = SCHEDULE, **changes: Any) -> Controller:
    options: dict[str, Any] = {
        **({"proportions": PROPORTIONS} if kind == "static" else {}),
        **({"schedule_file": "stages.yaml"} if kind == "schedule" else {}),
        **changes,
    }
    return make_controller(section(kind, **options), dict(zip(NAMES, sizes, strict=True)), schedule)


def logs(proportions: Sequence[float]) -> NDArray[np.float64]:
    return Factors.of(np.array(proportions)).logs


def assert_are(computed: Factors, expected: Sequence[float] | NDArray[np.float64]) -> None:
    np.testing.assert_allclose(computed.proportions, expected, rtol=1e-13)
    np.testing.assert_allclose(computed.logs, np.log(expected), rtol=1e-13)


def eq1(ratios: Sequence[float], floor: float = 0.0) -> NDArray[np.float64]:
    shares = np.exp(np.array(ratios))
    return floor + (1 - floor * len(shares)) * shares / shares.sum()


def eq2(proportions: NDArray[np.float64], ratios: Sequence[float], alpha: float) -> NDArray[np.float64]:
    shares = proportions * np.exp(np.array(ratios))
    return alpha * shares / shares.sum() + (1 - alpha) / len(shares)


def test_ddk_is_eq1_and_then_eq2() -> None:
    controller = build("ddk", alpha=0.3)
    r0 = controller.start(STUDENT, TEACHER)
    first = eq1([9 / 3, 30 / 12, 12 / 10])
    assert_are(r0, first)
    later = [5.0, 20.0, 11.0]
    assert_are(controller.update(r0.logs, later, TEACHER, interval=1), eq2(first, [5 / 3, 20 / 12, 11 / 10], 0.3))


def test_ddk_uses_its_cap_and_floor() -> None:
    controller = build("ddk", ratio_cap=2.0, initial_floor=0.2)
    r0 = controller.start(STUDENT, TEACHER)
    first = eq1([2.0, 2.0, 1.2], floor=0.2)
    assert_are(r0, first)
    assert_are(controller.update(r0.logs, STUDENT, TEACHER, interval=1), eq2(first, [2.0, 2.0, 1.2], 0.5))


def test_without_smoothing_the_past_takes_no_part() -> None:
    controller = build("ddk_no_smoothing", initial_floor=0.1)
    later = [5.0, 20.0, 11.0]
    expected = eq1([5 / 3, 20 / 12, 11 / 10], floor=0.1)
    for past in ([1.0, 0.0, 0.0], [0.2, 0.2, 0.6]):
        assert_are(controller.update(logs(past), later, TEACHER, interval=1), expected)
    assert_are(controller.start(later, TEACHER), expected)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("equal", [1 / 3, 1 / 3, 1 / 3]), ("by_size", [0.1, 0.3, 0.6]), ("static", [0.5, 0.3, 0.2])],
)
def test_fixed_mixtures_need_no_perplexities(kind: str, expected: list[float]) -> None:
    controller = build(kind)
    assert not controller.uses_teacher
    np.testing.assert_allclose(controller.start(None, None).proportions, expected, rtol=1e-15)
    updated = controller.update(logs([1.0, 0.0, 0.0]), None, None, interval=1)
    np.testing.assert_allclose(updated.proportions, expected, rtol=1e-15)


def test_fixed_mixtures_return_a_new_array_each_time() -> None:
    controller = build("equal")
    controller.start(None, None).proportions[0] = 7.0
    np.testing.assert_allclose(controller.start(None, None).proportions, 1 / 3)


def test_static_proportions_are_given_in_any_order() -> None:
    controller = build("static", proportions={"prose": 0.2, "code": 0.5, "maths": 0.3})
    np.testing.assert_array_equal(controller.start(None, None).proportions, [0.5, 0.3, 0.2])


@pytest.mark.parametrize("kind", get_args(ControllerKind))
def test_the_state_is_plain_json_and_differs_between_controllers(kind: str) -> None:
    controller = build(kind)
    state = controller.state_dict()
    assert controller.name == state["name"] == kind
    assert json.loads(json.dumps(state)) == state
    assert state["names"] == list(NAMES)
    others = [build(other).state_dict() for other in get_args(ControllerKind) if other != kind]
    assert state not in others


def test_the_state_holds_the_options() -> None:
    assert build("ddk", alpha=0.2, ratio_cap=9.0, initial_floor=0.01).state_dict() == {
        "name": "ddk",
        "names": list(NAMES),
        "alpha": 0.2,
        "ratio_cap": 9.0,
        "initial_floor": 0.01,
        "initial": "eq1",
        "prior": None,
        "ppl_smoothing": 0.0,
    }
    assert build("static").state_dict()["proportions"] == [0.5, 0.3, 0.2]


def test_the_defaults_are_the_papers() -> None:
    assert build("ddk") == DDK(
        NAMES, alpha=0.5, ratio_cap=None, initial_floor=0.0, initial="eq1", prior=None, ppl_smoothing=0.0
    )
    assert build("sheared_llama") == ShearedLlama(
        NAMES, prior=None, reference=None, ppl_smoothing=0.0, source="held_out"
    )
    assert build("doremi_online") == DoReMiOnline(
        NAMES, prior=None, reference=None, ppl_smoothing=0.0, source="held_out", step_size=1.0, smoothing=1e-3
    )


@pytest.mark.parametrize("kind", ["ddk", "ddk_no_smoothing"])
def test_ddk_needs_the_perplexities_of_both_models(kind: str) -> None:
    controller = build(kind)
    assert controller.uses_teacher
    with pytest.raises(DataError, match="teacher's perplexities are missing"):
        controller.start(STUDENT, None)
    with pytest.raises(DataError, match="domain 'maths' is nan"):
        controller.update(logs([0.2, 0.2, 0.6]), [9.0, float("nan"), 12.0], TEACHER, interval=1)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("dkk", {}, "mixture.controller: .* got 'dkk'"),
        ("ddk", {"alpha": 1.5}, "mixture.alpha: .* got 1.5"),
        ("ddk", {"alpha": float("nan")}, "mixture.alpha: .* got nan"),
        ("ddk", {"ratio_cap": -1.0}, "mixture.ratio_cap: .* got -1.0"),
        ("ddk", {"ratio_cap": 0.0}, "mixture.ratio_cap: .* got 0.0"),
        ("ddk", {"ratio_cap": float("inf")}, "mixture.ratio_cap: .* got inf"),
        ("ddk", {"initial_floor": 0.4}, "mixture.initial_floor is 0.4 for 3 domains"),
        ("ddk_no_smoothing", {"initial_floor": -0.1}, "mixture.initial_floor: .* got -0.1"),
        ("ddk", {"ppl_smoothing": float("nan")}, "mixture.ppl_smoothing: .* got nan"),
        ("ddk", {"proportions": PROPORTIONS}, "mixture: proportions is .* set mixture.controller to static"),
        ("static", {"proportions": None}, "mixture: controller: static needs mixture.proportions"),
        ("static", {"proportions": [0.5, 0.3, 0.2]}, "mixture.proportions: .* dictionary"),
        ("static", {"proportions": dict.fromkeys(NAMES, 0.5)}, "sum 1.5"),
        ("static", {"proportions": {"code": 0.5, "maths": 0.5}}, "'prose' has no proportion"),
        ("static", {"proportions": dict.fromkeys((*NAMES, "law"), 0.25)}, "'law' is not a domain"),
        ("by_size", {"sizes": [1, 0, 2]}, "domain 'maths' has size 0"),
    ],
)
def test_bad_options_are_refused_before_training(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(kind, **changes)
