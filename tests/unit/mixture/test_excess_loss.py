"""Sheared LLaMA's and DoReMi's updates, each against its paper's algorithm written down a second time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk_ds.errors import ConfigError, DataError
from ddk_ds.mixture.controllers import ControllerOptions, make_controller
from ddk_ds.mixture.excess_loss import DoReMiOnline, ShearedLlama

NAMES = ("code", "maths", "prose")
SIZES = [100, 300, 600]
losses = st.lists(st.floats(0.01, 9.0), min_size=3, max_size=3)


def sheared_llama(shares: list[float], student: list[float], reference: list[float]) -> list[float]:
    """arXiv 2310.06694, Algorithm 1, in losses."""
    alpha = [w * math.exp(max(a - b, 0.0)) for w, a, b in zip(shares, student, reference, strict=True)]
    return [value / sum(alpha) for value in alpha]


def doremi(shares: list[float], student: list[float], reference: list[float], eta: float, c: float) -> list[float]:
    """arXiv 2305.10429, Algorithm 1, in losses."""
    raised = [w * math.exp(eta * max(a - b, 0.0)) for w, a, b in zip(shares, student, reference, strict=True)]
    return [(1 - c) * value / sum(raised) + c * (1 / len(raised)) for value in raised]


@given(losses, losses, st.floats(0, 3), st.floats(0, 1))
def test_updates_are_the_papers(student: list[float], teacher: list[float], eta: float, c: float) -> None:
    shares = [0.1, 0.3, 0.6]
    perplexities = np.exp(student), np.exp(teacher)
    found = ShearedLlama(NAMES).update(np.array(shares), *perplexities, interval=1)
    np.testing.assert_allclose(found, sheared_llama(shares, student, teacher), rtol=1e-12)
    found = DoReMiOnline(NAMES, step_size=eta, smoothing=c).update(np.array(shares), *perplexities, interval=1)
    np.testing.assert_allclose(found, doremi(shares, student, teacher, eta, c), rtol=1e-12)


def test_a_domain_at_its_reference_gains_nothing_from_being_under_it() -> None:
    reference = (1.0, 2.0, 3.0)
    for controller in (ShearedLlama(NAMES, reference=reference), DoReMiOnline(NAMES, reference=reference)):
        at = controller.update(np.full(3, 1 / 3), np.exp([2.0, 2.0, 3.0]), None, interval=1)
        under = controller.update(np.full(3, 1 / 3), np.exp([2.0, 0.5, 3.0]), None, interval=1)
        np.testing.assert_array_equal(at, under)
        assert at[0] > at[1] == at[2]


def test_large_losses_do_not_overflow() -> None:
    student, teacher = [1e300, 2.0, 3.0], [1.0, 2.0, 3.0]
    np.testing.assert_allclose(
        ShearedLlama(NAMES).update(np.full(3, 1 / 3), student, teacher, interval=1), [1, 0, 0], atol=1e-12
    )
    found = DoReMiOnline(NAMES, step_size=5.0).update(np.full(3, 1 / 3), student, teacher, interval=1)
    np.testing.assert_allclose(found, [1 - 2e-3 / 3, 1e-3 / 3, 1e-3 / 3])


@pytest.mark.parametrize("kind", ["sheared_llama", "doremi_online"])
def test_they_begin_with_the_prior(kind: str) -> None:
    def start(**options: object) -> list[float]:
        controller = make_controller(kind, NAMES, ControllerOptions(**options), sizes=SIZES)  # type: ignore[arg-type]
        return controller.start([9.0, 9.0, 9.0], [3.0, 1.0, 1.0]).tolist()

    assert start() == [1 / 3] * 3
    assert start(prior="by_size") == [0.1, 0.3, 0.6]
    assert start(prior={"prose": 0.5, "code": 0.25, "maths": 0.25}) == [0.25, 0.25, 0.5]


@pytest.mark.parametrize("kind", ["sheared_llama", "doremi_online"])
def test_given_references_take_the_teachers_place(kind: str) -> None:
    by_teacher = make_controller(kind, NAMES, ControllerOptions(), sizes=SIZES)
    reference = {"prose": math.log(2.0), "code": math.log(3.0), "maths": math.log(12.0)}
    given_ = make_controller(kind, NAMES, ControllerOptions(reference_losses=reference), sizes=SIZES)
    assert by_teacher.uses_teacher and not given_.uses_teacher
    shares, student = np.array([0.2, 0.3, 0.5]), [9.0, 30.0, 12.0]
    np.testing.assert_allclose(
        given_.update(shares, student, None, interval=1),
        by_teacher.update(shares, student, [3.0, 12.0, 2.0], interval=1),
        rtol=1e-14,
    )
    with pytest.raises(DataError, match="teacher's perplexities are missing"):
        by_teacher.update(shares, student, None, interval=1)
    with pytest.raises(DataError, match="student's perplexity of domain 'maths' is nan"):
        given_.update(shares, [9.0, float("nan"), 12.0], None, interval=1)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"code": 1.0, "maths": 1.0}, "reference_losses: 'prose' has no loss"),
        ({"code": 1.0, "maths": 1.0, "prosa": 1.0}, "'prosa' is not a domain of this run: did you mean 'prose'"),
        ({"code": 1.0, "maths": -1.0, "prose": 1.0}, "'maths' has -1.0"),
    ],
)
def test_bad_references_are_refused(reference: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_controller("sheared_llama", NAMES, ControllerOptions(reference_losses=reference), sizes=SIZES)


def test_the_defaults_are_the_papers() -> None:
    assert (DoReMiOnline(NAMES).step_size, DoReMiOnline(NAMES).smoothing) == (1.0, 1e-3)
    assert make_controller("doremi_online", NAMES, ControllerOptions(), sizes=SIZES) == DoReMiOnline(NAMES)
    assert make_controller("sheared_llama", NAMES, ControllerOptions(), sizes=SIZES) == ShearedLlama(NAMES)
