"""The controllers: what each returns, what it needs, what it tells a checkpoint, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ddk_ds.errors import ConfigError, DataError
from ddk_ds.mixture.controllers import CONTROLLER_KINDS, Controller, ControllerOptions, make_controller
from ddk_ds.mixture.ddk import DDK
from ddk_ds.mixture.factors import initial_factors, smooth_update
from ddk_ds.mixture.fixed import Static

NAMES = ("code", "maths", "prose")
STUDENT, TEACHER = [9.0, 30.0, 12.0], [3.0, 12.0, 10.0]


SCHEDULE = [
    {"from_interval": 0, "proportions": {"code": 0.5, "maths": 0.3, "prose": 0.2}},
    {"from_interval": 3, "proportions": {"code": 0, "maths": 0.25, "prose": 0.75}},
]


def build(kind: str, sizes: Sequence[int] = (100, 300, 600), schedule: Any = SCHEDULE, **changes: Any) -> Controller:
    options: dict[str, Any] = {
        "proportions": [0.5, 0.3, 0.2] if kind == "static" else None,
        "schedule_file": "stages.yaml" if kind == "schedule" else None,
    }
    return make_controller(kind, NAMES, ControllerOptions(**{**options, **changes}), sizes=sizes, schedule=schedule)


def test_ddk_is_eq1_and_then_eq2() -> None:
    controller = build("ddk", alpha=0.3)
    r0 = controller.start(STUDENT, TEACHER)
    np.testing.assert_array_equal(r0, initial_factors(STUDENT, TEACHER))
    later = [5.0, 20.0, 11.0]
    np.testing.assert_array_equal(
        controller.update(r0, later, TEACHER, interval=1), smooth_update(r0, later, TEACHER, alpha=0.3)
    )


def test_ddk_hands_its_cap_and_floor_on() -> None:
    controller = build("ddk", ratio_cap=2.0, initial_floor=0.2)
    r0 = controller.start(STUDENT, TEACHER)
    np.testing.assert_array_equal(r0, initial_factors(STUDENT, TEACHER, ratio_cap=2.0, floor=0.2))
    np.testing.assert_array_equal(
        controller.update(r0, STUDENT, TEACHER, interval=1),
        smooth_update(r0, STUDENT, TEACHER, alpha=0.5, ratio_cap=2.0),
    )


def test_without_smoothing_the_past_takes_no_part() -> None:
    controller = build("ddk_no_smoothing", initial_floor=0.1)
    later = [5.0, 20.0, 11.0]
    expected = initial_factors(later, TEACHER, floor=0.1)
    for past in ([1.0, 0.0, 0.0], [0.2, 0.2, 0.6]):
        np.testing.assert_array_equal(controller.update(np.array(past), later, TEACHER, interval=1), expected)
    np.testing.assert_array_equal(controller.start(later, TEACHER), expected)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("equal", [1 / 3, 1 / 3, 1 / 3]), ("by_size", [0.1, 0.3, 0.6]), ("static", [0.5, 0.3, 0.2])],
)
def test_fixed_mixtures_need_no_perplexities(kind: str, expected: list[float]) -> None:
    controller = build(kind)
    assert not controller.uses_teacher
    np.testing.assert_allclose(controller.start(None, None), expected, rtol=1e-15)
    np.testing.assert_allclose(
        controller.update(np.array([1.0, 0.0, 0.0]), None, None, interval=1), expected, rtol=1e-15
    )


def test_fixed_mixtures_hand_out_arrays_of_their_own() -> None:
    controller = build("equal")
    controller.start(None, None)[0] = 7.0
    np.testing.assert_allclose(controller.start(None, None), 1 / 3)


def test_static_proportions_may_be_named() -> None:
    controller = build("static", proportions={"prose": 0.2, "code": 0.5, "maths": 0.3})
    np.testing.assert_array_equal(controller.start(None, None), [0.5, 0.3, 0.2])


@pytest.mark.parametrize("kind", CONTROLLER_KINDS)
def test_the_state_is_plain_json_that_tells_controllers_apart(kind: str) -> None:
    controller = build(kind)
    state = controller.state_dict()
    assert controller.name == state["name"] == kind
    assert json.loads(json.dumps(state)) == state
    assert state["names"] == list(NAMES)
    others = [build(other).state_dict() for other in CONTROLLER_KINDS if other != kind]
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
    controller = DDK(NAMES)
    assert (controller.alpha, controller.ratio_cap, controller.initial_floor) == (0.5, None, 0.0)
    assert (controller.initial, controller.prior, controller.ppl_smoothing) == ("eq1", None, 0.0)
    assert make_controller("ddk", NAMES, ControllerOptions(), sizes=[1, 1, 1]) == controller
    assert Static(NAMES, (0.5, 0.3, 0.2)).name == "static"


@pytest.mark.parametrize("kind", ["ddk", "ddk_no_smoothing"])
def test_ddk_refuses_to_go_without_perplexities(kind: str) -> None:
    controller = build(kind)
    assert controller.uses_teacher
    with pytest.raises(DataError, match="teacher's perplexities are missing"):
        controller.start(STUDENT, None)
    with pytest.raises(DataError, match="domain 'maths' is nan"):
        controller.update(np.array([0.2, 0.2, 0.6]), [9.0, float("nan"), 12.0], TEACHER, interval=1)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("dkk", {}, "unknown controller 'dkk' .did you mean 'ddk'"),
        ("ddk", {"alpha": 1.5}, "mixture.alpha is 1.5"),
        ("ddk", {"ratio_cap": -1.0}, "mixture.ratio_cap is -1.0"),
        ("ddk", {"initial_floor": 0.4}, "mixture.initial_floor is 0.4 for 3 domains"),
        ("ddk_no_smoothing", {"initial_floor": -0.1}, "mixture.initial_floor"),
        ("ddk", {"proportions": [0.5, 0.3, 0.2]}, "mixture.proportions"),
        ("static", {"proportions": None}, "'static' needs proportions"),
        ("static", {"proportions": [0.5, 0.5]}, "2 values for 3 domains"),
        ("static", {"proportions": [0.5, 0.5, 0.5]}, "sum 1.5"),
        ("static", {"proportions": {"code": 0.5, "maths": 0.5}}, "'prose' has no proportion"),
        ("static", {"proportions": dict.fromkeys((*NAMES, "law"), 0.25)}, "'law' is not a domain"),
        ("by_size", {"sizes": [1, 2]}, "2 domain sizes for 3 domains"),
        ("by_size", {"sizes": [1, 0, 2]}, "domain 'maths' has size 0"),
    ],
)
def test_bad_options_are_refused_before_training(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(kind, **changes)


@pytest.mark.parametrize("names", [(), ("code", "code")])
def test_domains_must_be_named_once(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="at least one, each once"):
        make_controller("equal", names, ControllerOptions(), sizes=[1, 1])
