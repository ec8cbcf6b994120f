"""Proportions by interval from a file: the stage of each interval, equality with static, and errors of the file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ddk_ds.errors import ConfigError
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.decide import Controller, Decision, decide
from tests.unit.mixture.mixture_section import section

NAMES = ("code", "maths", "prose")
SIZES = {"code": 1, "maths": 2, "prose": 3}
PROPORTIONS = {"prose": 0.1, "code": 0.7, "maths": 0.2}


def scheduled(content: Any, exclude: tuple[str, ...] = ()) -> Controller:
    return make_controller(section("schedule", schedule_file="/stages.yaml", exclude=exclude), SIZES, content)


def entry(first: Any, **by_domain: Any) -> dict[str, Any]:
    return {"from_interval": first, "proportions": by_domain}


def proportions(controller: Controller, intervals: int) -> list[list[float]]:
    decisions: list[Decision] = []
    for t in range(intervals):
        decisions.append(decide(controller, decisions[-1] if decisions else None, np.ones(3), None, interval=t))
    return [decision.proportions for decision in decisions]


def test_a_stage_holds_until_the_next_begins() -> None:
    content = [entry(0, code=1, maths=0, prose=0), entry(2, **PROPORTIONS), entry(3, code=0.0, maths=0.5, prose=0.5)]
    computed = proportions(scheduled(content), 6)
    assert computed == [[1, 0, 0]] * 2 + [[0.7, 0.2, 0.1]] + [[0, 0.5, 0.5]] * 3


@pytest.mark.parametrize("given", [PROPORTIONS, {"code": 1 / 3, "maths": 1 / 3, "prose": 1 - 2 / 3 + 3e-7}])
def test_one_stage_is_a_static_mixture_exactly(given: dict[str, float]) -> None:
    static = make_controller(section("static", proportions=given), SIZES)
    assert proportions(scheduled([entry(0, **given)]), 4) == proportions(static, 4)
    assert proportions(static, 1)[0] == [given[name] for name in NAMES]


def test_an_excluded_domain_needs_no_entry() -> None:
    content = [entry(0, code=0.25, prose=0.75), entry(1, code=0.5, prose=0.5, maths=0)]
    assert proportions(scheduled(content, exclude=("maths",)), 2) == [[0.25, 0, 0.75], [0.5, 0, 0.5]]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["NoneType", "a list"]),
        ([], ["at least one entry"]),
        ({"from_interval": 0}, ["dict", "a list"]),
        ([entry(1, **PROPORTIONS)], ["entry 1", "from_interval is 1", "interval 0"]),
        ([entry(0, **PROPORTIONS), entry(0, **PROPORTIONS)], ["entry 2", "from_interval is 0"]),
        ([entry(0, **PROPORTIONS), entry("2", **PROPORTIONS)], ["entry 2", "from_interval is '2'"]),
        ([entry(True, **PROPORTIONS)], ["entry 1", "from_interval is True"]),
        ([{"from_interval": 0, "weights": PROPORTIONS}], ["entry 1", "from_interval, weights"]),
        ([{"from_interval": 0, "proportions": [0.5, 0.5]}], ["entry 1", "[0.5, 0.5]", "for each domain"]),
        ([entry(0, **PROPORTIONS), entry(4, code=0.5, maths=0.5)], ["entry 2", "'prose' has no proportion"]),
        ([entry(0, **PROPORTIONS, proze=0.0)], ["entry 1", "'proze' is not a domain", "did you mean 'prose'"]),
        ([{"from_interval": 0, "proportions": {**PROPORTIONS, 7: 0.0}}], ["entry 1", "'7' is not a domain"]),
        ([entry(0, code=0.5, maths="half", prose=0.1)], ["entry 1", "'maths' is 'half'"]),
        ([entry(0, code=0.5, maths=0.6, prose=0.1)], ["entry 1", "sum 1.2"]),
        ([entry(0, code=0.5, maths=0.6, prose=-0.1)], ["entry 1", "-0.1"]),
    ],
)
def test_an_error_names_the_place_in_the_file(content: Any, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        scheduled(content)
    for part in ["mixture.schedule_file /stages.yaml", *parts]:
        assert part in str(caught.value), caught.value


def test_a_proportion_of_an_excluded_domain_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"entry 1: proportions: 'maths' has 0.2, and mixture.exclude names it"):
        scheduled([entry(0, **PROPORTIONS)], exclude=("maths",))
