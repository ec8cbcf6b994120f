"""The options that make DDK safe: each has its effect, and with all of them off the numbers are the paper's."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_ds.config.mixture_options import ControllerKind
from ddk_ds.errors import ConfigError
from ddk_ds.mixture.bounds import Bounded, raise_to_floors
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.decide import Controller, Decision, decide
from ddk_ds.mixture.domain_vectors import Factors
from ddk_ds.mixture.interval_state import DomainEntry, IntervalState, interval_ids
from ddk_ds.mixture.order import DomainOrder
from tests.unit.mixture.mixture_section import section

NAMES = ("code", "law", "maths", "prose")
SIZES = [100, 200, 300, 400]
TEACHER = np.array([3.0, 2.0, 12.0, 10.0])
STUDENTS = np.array([[9.0, 18.0, 30.0, 12.0], [7.0, 14.0, 25.0, 11.0], [6.0, 15.0, 20.0, 10.5], [5.0, 9.0, 19.0, 10.2]])
SCHEDULE = [{"from_interval": 0, "proportions": {"code": 0.5, "maths": 0.25, "prose": 0.25}}]
perplexities = st.lists(st.floats(1.0, 60.0), min_size=4, max_size=4).map(np.array)


def build(kind: str, names: tuple[str, ...] = NAMES, sizes: list[int] = SIZES, **options: Any) -> Controller:
    if kind == "static":
        options = {"proportions": {"code": 0.5, "maths": 0.25, "prose": 0.25}, **options}
    if kind == "schedule":
        options = {"schedule_file": "stages.yaml", **options}
    return make_controller(section(kind, **options), dict(zip(names, sizes, strict=True)), SCHEDULE)


def decisions(controller: Controller, students: Any = STUDENTS, teacher: Any = TEACHER) -> list[Decision]:
    """Return the decisions of a run whose student has the perplexities `students`, (intervals, N)."""
    made: list[Decision] = []
    for t, student in enumerate(np.asarray(students)):
        made.append(decide(controller, made[-1] if made else None, student, teacher, interval=t))
    return made


def proportions_of(controller: Controller, students: Any = STUDENTS, teacher: Any = TEACHER) -> np.ndarray:
    return np.array([decision.proportions for decision in decisions(controller, students, teacher)])


def test_with_every_option_off_the_numbers_are_the_papers_bit_by_bit() -> None:
    """Eq. 1 and 2 of arXiv 2407.16154, written down again without options and in the same order of operations."""
    proportions = proportions_of(build("ddk"))
    weights = np.exp(STUDENTS[0] / TEACHER - (STUDENTS[0] / TEACHER).max())
    current = weights / math.fsum(weights)
    np.testing.assert_array_equal(proportions[0], current)
    for student, updated in zip(STUDENTS[1:], proportions[1:], strict=True):
        exponents = np.log(current) + (student / TEACHER - (student / TEACHER).max())
        weights = np.exp(exponents - exponents.max())
        current = 0.5 * (weights / math.fsum(weights)) + (1 - 0.5) / 4
        np.testing.assert_array_equal(updated, current)
    off = build("ddk", exclude=(), floors={}, ppl_smoothing=0.0, prior="equal", initial="eq1", ratio_cap=None)
    assert off == build("ddk") and not isinstance(off, Bounded)
    assert [decision.smoothed_ppl for decision in decisions(off)] == [[]] * 4


@pytest.mark.parametrize("kind", get_args(ControllerKind))
def test_a_run_with_an_excluded_domain_is_the_run_without_it(kind: str) -> None:
    """Its proportion is 0, and the others are bit by bit those of a run that never had it: N counts drawn domains."""
    students, teacher = STUDENTS.copy(), TEACHER.copy()
    students[:, 1], teacher[1] = np.nan, np.nan  # its perplexities are not used
    proportions = proportions_of(build(kind, exclude=("law",)), students, teacher)
    left = [0, 2, 3]
    alone = build(kind, names=("code", "maths", "prose"), sizes=[100, 300, 400])
    np.testing.assert_array_equal(proportions[:, 1], 0.0)
    np.testing.assert_array_equal(proportions[:, left], proportions_of(alone, STUDENTS[:, left], TEACHER[left]))


def decided(proportions: list[float]) -> Decision:
    return Decision(proportions, [], [math.log(value) if value else None for value in proportions])


def raised(floors: list[float], proportions: np.ndarray) -> np.ndarray:
    return raise_to_floors(floors, Factors.of(proportions)).proportions


def test_a_fork_that_excludes_a_domain_divides_its_proportion() -> None:
    controller = build("sheared_llama", exclude=("law",))
    last = decided([0.1, 0.6, 0.1, 0.2])
    decision = decide(controller, last, TEACHER, TEACHER, interval=5)
    np.testing.assert_allclose(decision.proportions, [0.25, 0, 0.25, 0.5], rtol=1e-14)
    decision = decide(controller, decided([0, 1.0, 0, 0]), TEACHER, TEACHER, interval=5)
    np.testing.assert_allclose(decision.proportions, [1 / 3, 0, 1 / 3, 1 / 3], rtol=1e-14)


@settings(deadline=None)
@given(perplexities, perplexities, st.lists(st.floats(0, 0.25), min_size=4, max_size=4))
def test_floors_hold_in_every_interval(first: Any, second: Any, least: list[float]) -> None:
    floors = dict(zip(NAMES, least, strict=True))
    for kind in ("ddk", "ddk_no_smoothing", "sheared_llama", "doremi_online", "by_size"):
        proportions = proportions_of(build(kind, floors=floors), [first, second], TEACHER)
        assert (proportions >= least).all()
        np.testing.assert_allclose(proportions.sum(1), 1, rtol=1e-12)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4).filter(any), st.lists(st.floats(0, 0.25), min_size=4))
def test_raising_to_a_floor_keeps_the_ratios_of_the_others(weights: list[int], least: list[float]) -> None:
    before, least = np.array(weights) / sum(weights), least[:4]
    after = raised(least, before)
    assert (after >= least).all() and abs(after.sum() - 1) < 1e-12
    if (before >= least).all():
        np.testing.assert_array_equal(after, before)
    above = after > np.array(least) * (1 + 1e-9)
    if above.any() and before[above].all():
        ratios = after[above] / before[above]
        np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9)
        assert ratios[0] <= 1 + 1e-12


def test_floors_by_hand() -> None:
    np.testing.assert_allclose(raised([0.2, 0, 0, 0], np.array([0.0, 0.5, 0.25, 0.25])), [0.2, 0.4, 0.2, 0.2])
    # The second falls under its floor only once the first is raised.
    np.testing.assert_allclose(
        raised([0.5, 0.24, 0, 0], np.array([0.0, 0.25, 0.5, 0.25])), [0.5, 0.24, 0.52 / 3, 0.26 / 3]
    )
    np.testing.assert_allclose(raised([0.25] * 4, np.array([1.0, 0, 0, 0])), [0.25] * 4)


def test_a_prior_takes_the_place_of_one_over_n() -> None:
    prior = {"code": 0.1, "law": 0.2, "maths": 0.3, "prose": 0.4}
    proportions = proportions_of(build("ddk", prior=prior, alpha=0.25))
    np.testing.assert_array_equal(proportions, proportions_of(build("ddk", prior="by_size", alpha=0.25)))
    psi = proportions[0] * np.exp(STUDENTS[1] / TEACHER)
    np.testing.assert_allclose(
        proportions[1], 0.25 * psi / psi.sum() + 0.75 * np.array([0.1, 0.2, 0.3, 0.4]), rtol=1e-12
    )
    np.testing.assert_allclose(proportions_of(build("ddk", prior=prior, alpha=0.0))[1:], [[0.1, 0.2, 0.3, 0.4]] * 3)
    by_size = proportions_of(build("ddk", prior="by_size", alpha=0.0, exclude=("law",)))
    np.testing.assert_allclose(by_size[1:], [[0.125, 0, 0.375, 0.5]] * 3)


def test_smoothed_perplexities_are_a_moving_average_of_their_logs() -> None:
    made = decisions(build("ddk", ppl_smoothing=0.75))
    average = np.log(STUDENTS[0])
    expected = [np.exp(average)]
    for student in STUDENTS[1:]:
        average = 0.75 * average + 0.25 * np.log(student)
        expected.append(np.exp(average))
    np.testing.assert_allclose([decision.smoothed_ppl for decision in made], expected, rtol=1e-12)
    np.testing.assert_allclose(
        [decision.proportions for decision in made], proportions_of(build("ddk"), expected), rtol=1e-10
    )


def test_smoothing_begins_with_the_first_measurement() -> None:
    assert decisions(build("ddk", ppl_smoothing=0.9))[0].proportions == decisions(build("ddk"))[0].proportions


def ids_of_a_run(controller: Controller, intervals: int) -> list[list[int]]:
    """Return the global sample ids of each interval of 103 samples, over domains of 60 to 150 samples."""
    sizes = [60, 90, 120, 150]
    state = IntervalState.new(
        [DomainEntry(name=name, num_samples=size, sha="0") for name, size in zip(NAMES, sizes, strict=True)], seed=5
    )
    orders = [DomainOrder(name, [30] * (size // 30), 5) for name, size in zip(NAMES, sizes, strict=True)]
    drawn = []
    for decision in decisions(controller, STUDENTS[:intervals]):
        state = state.advance(decision.proportions, 103)
        drawn.append(interval_ids(orders, np.cumsum(sizes) - sizes, state).tolist())
        state = state.consume(103)
    return drawn


def test_without_discrepancies_ddk_is_equal_sampling() -> None:
    """With alpha = 0 proportions are exactly equal from the second interval on.

    With initial: equal they are equal from the first, and every sample of every interval is that of controller equal.
    """
    equal = proportions_of(build("equal"))
    proportions = proportions_of(build("ddk", alpha=0.0))
    np.testing.assert_array_equal(proportions[1:], equal[1:])
    assert not np.array_equal(proportions[0], equal[0])
    from_the_start = build("ddk", alpha=0.0, initial="equal")
    np.testing.assert_array_equal(proportions_of(from_the_start), equal)
    assert ids_of_a_run(from_the_start, 4) == ids_of_a_run(build("equal"), 4)
    assert ids_of_a_run(build("ddk", alpha=0.5, initial="equal"), 4) != ids_of_a_run(build("equal"), 4)
    bounded = {"exclude": ("law",)}
    alike = ids_of_a_run(build("ddk", alpha=0.0, initial="equal", **bounded), 4)
    assert alike == ids_of_a_run(build("equal", **bounded), 4)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ddk", {"exclude": ("lore",)}, "mixture.exclude: 'lore' is not a domain of this run"),
        ("ddk", {"exclude": NAMES}, "names every domain"),
        ("ddk", {"floors": {"lawe": 0.1}}, "mixture.floors: 'lawe' is not a domain of this run: did you mean 'law'"),
        ("ddk", {"floors": {"law": 0.6, "code": 0.5}}, r"mixture.floors are .* \(sum 1.1\)"),
        ("ddk", {"floors": {"law": -0.1}}, "mixture.floors.law: .* got -0.1"),
        ("ddk", {"floors": {"law": 0.1}, "exclude": ("law",)}, "'law' is in mixture.exclude too"),
        ("ddk", {"prior": "sizes"}, "mixture.prior.* got 'sizes'"),
        ("ddk", {"prior": {"code": 1.0}}, "mixture.prior: 'law' has no proportion"),
        ("ddk", {"prior": dict.fromkeys(NAMES, 0.5)}, r"mixture.prior are .* \(sum 2.0\)"),
        ("ddk", {"prior": dict.fromkeys(NAMES, 0.25), "exclude": ("law",)}, "'law' has 0.25, and mixture.exclude"),
        ("ddk", {"ppl_smoothing": 1.0}, "mixture.ppl_smoothing: .* got 1.0"),
        ("static", {"proportions": dict.fromkeys(NAMES, 0.25), "exclude": ("law",)}, "mixture.proportions: 'law'"),
    ],
)
def test_bad_options_are_refused_before_training(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(kind, **options)


def test_the_state_holds_the_bounds() -> None:
    state = build("ddk", exclude=("law",), floors={"code": 0.2}).state_dict()
    assert (state["names"], state["exclude"], state["floors"]) == (list(NAMES), ["law"], [0.2, 0.0, 0.0])
    assert (state["name"], state["alpha"]) == ("ddk", 0.5)
