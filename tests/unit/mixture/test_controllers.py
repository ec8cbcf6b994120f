"""Every kind of controller: what it starts from, what it continues to, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from ddk_ds.errors import ConfigError, DataError
from ddk_ds.mixture import (
    CONTROLLER_KINDS,
    DDK,
    Controller,
    DDKNoSmoothing,
    Static,
    initial_factors,
    make_controller,
    smooth_update,
)

NAMES = ("web", "code", "math")
SIZES = (600, 300, 100)
STUDENT, TEACHER = (30.0, 6.0, 9.0), (12.0, 4.0, 5.0)
LATER = (13.0, 5.0, 8.0)
PAST = np.array([0.2, 0.3, 0.5])


def build(kind: str, **options: Any) -> Controller:
    """A controller over NAMES with the paper's options where no other is given."""
    given: dict[str, Any] = {
        "alpha": 0.3,
        "ratio_cap": None,
        "initial_floor": 0.0,
        "proportions": {"web": 0.5, "code": 0.2, "math": 0.3} if kind == "static" else None,
        "sizes": SIZES,
    }
    return make_controller(kind, NAMES, **{**given, **options})


@pytest.mark.parametrize("kind", CONTROLLER_KINDS)
def test_every_kind_gives_proportions(kind: str) -> None:
    controller = build(kind)
    assert controller.name == kind
    assert controller.uses_teacher == kind.startswith("ddk")
    for proportions in (
        controller.start(STUDENT, TEACHER),
        controller.update(controller.start(STUDENT, TEACHER), LATER, TEACHER),
    ):
        assert proportions.shape == (3,)
        assert (proportions > 0).all()
        assert proportions.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kind", CONTROLLER_KINDS)
def test_state_is_json_and_decides_all(kind: str) -> None:
    state = build(kind).state_dict()
    assert json.loads(json.dumps(state)) == state
    assert (state["name"], state["names"]) == (kind, list(NAMES))
    options = {key: value for key, value in state.items() if key != "name"}
    rebuilt: Controller
    if kind == "ddk":
        rebuilt = DDK(**options)
    elif kind == "ddk_no_smoothing":
        rebuilt = DDKNoSmoothing(**options)
    else:
        rebuilt = Static(**options, name=kind)
    expected = build(kind).update(PAST, LATER, TEACHER)
    assert rebuilt.update(PAST, LATER, TEACHER).tolist() == expected.tolist()


def test_ddk_is_eq1_then_eq2() -> None:
    controller = build("ddk", ratio_cap=2.0, initial_floor=0.1)
    start = initial_factors(STUDENT, TEACHER, ratio_cap=2.0, floor=0.1)
    assert controller.start(STUDENT, TEACHER).tolist() == start.tolist()
    update = smooth_update(PAST, LATER, TEACHER, alpha=0.3, ratio_cap=2.0)
    assert controller.update(PAST, LATER, TEACHER).tolist() == update.tolist()


def test_alpha_zero_equals_equal_sampling() -> None:
    found = build("ddk", alpha=0.0).update(PAST, LATER, TEACHER)
    assert found.tolist() == build("equal").update(PAST, LATER, TEACHER).tolist()


def test_no_smoothing_is_eq1_afresh() -> None:
    controller = build("ddk_no_smoothing", ratio_cap=2.0, initial_floor=0.1)
    expected = initial_factors(LATER, TEACHER, ratio_cap=2.0, floor=0.1).tolist()
    assert controller.update(PAST, LATER, TEACHER).tolist() == expected
    assert controller.update(PAST[::-1], LATER, TEACHER).tolist() == expected
    assert expected != controller.start(STUDENT, TEACHER).tolist()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("equal", [1 / 3] * 3), ("by_size", [0.6, 0.3, 0.1]), ("static", [0.5, 0.2, 0.3])],
)
def test_fixed_kinds_look_at_no_perplexity(kind: str, expected: list[float]) -> None:
    controller = build(kind)
    assert controller.start(None, None).tolist() == expected
    assert controller.update(PAST, [float("nan")] * 3, None).tolist() == expected


def test_fixed_proportions_cannot_be_changed_from_outside() -> None:
    controller = build("static")
    controller.start(None, None)[0] = 9
    assert controller.start(None, None).tolist() == [0.5, 0.2, 0.3]


def test_static_takes_names_in_any_order_and_plain_sequences() -> None:
    by_name = build("static", proportions={"math": 0.3, "web": 0.5, "code": 0.2})
    in_order = build("static", proportions=[0.5, 0.2, 0.3])
    assert by_name == in_order


@pytest.mark.parametrize(
    ("proportions", "message"),
    [
        ({"web": 0.5, "code": 0.5}, "'math' has no proportion"),
        ({"web": 0.5, "code": 0.2, "math": 0.2, "law": 0.1}, "'law' is not a domain of this run"),
        ({"web": 0.5, "code": 0.2, "math": 0.2}, r"sum 0\.9\)"),
        ([1.2, -0.2, 0.0], "numbers >= 0"),
        ([0.5, 0.5], "2 values for 3 domains"),
        ([float("nan"), 0.5, 0.5], "nan"),
        (None, "'static' needs proportions"),
    ],
)
def test_bad_proportions_are_refused(
    proportions: Mapping[str, float] | Sequence[float] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build("static", proportions=proportions)


@pytest.mark.parametrize("kind", [kind for kind in CONTROLLER_KINDS if kind != "static"])
def test_proportions_are_for_static_alone(kind: str) -> None:
    with pytest.raises(ConfigError, match="the others take none"):
        build(kind, proportions=[0.5, 0.2, 0.3])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ddk", {"alpha": 1.5}, r"mixture\.alpha is 1\.5"),
        ("ddk", {"ratio_cap": -1.0}, r"mixture\.ratio_cap is -1"),
        ("ddk", {"initial_floor": 0.5}, r"mixture\.initial_floor is 0\.5"),
        ("ddk_no_smoothing", {"initial_floor": 0.5}, r"mixture\.initial_floor is 0\.5"),
        ("by_size", {"sizes": (1, 2)}, "2 domain sizes for 3 domains"),
        ("by_size", {"sizes": (1, 0, 2)}, "domain 'code' has size 0"),
        ("dkd", {}, "unknown controller 'dkd' .did you mean 'ddk'"),
    ],
)
def test_bad_options_are_refused_at_once(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(kind, **options)


@pytest.mark.parametrize("names", [[], ["web", "web"]])
def test_bad_names_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="at least one, each once"):
        make_controller(
            "equal", names, alpha=0.5, ratio_cap=None, initial_floor=0.0, proportions=None, sizes=[]
        )


@pytest.mark.parametrize("kind", ["ddk", "ddk_no_smoothing"])
def test_ddk_names_the_domain_that_has_no_perplexity(kind: str) -> None:
    with pytest.raises(DataError, match="student's perplexity of domain 'math' is nan"):
        build(kind).update(PAST, [2.0, 2.0, float("nan")], TEACHER)
