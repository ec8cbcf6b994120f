"""ADO, ODM and the Boltzmann rules, each compared with a computation of its own from its paper's equations."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from scipy.optimize import least_squares

from ddk_ds.errors import ConfigError, DataError
from ddk_ds.mixture.ado import OBSERVATIONS, fit_law
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.decide import Controller, Decision, decide
from ddk_ds.mixture.interval_state import IntervalState
from ddk_ds.mixture.training_losses import filled, interval_means
from ddk_ds.train.checkpoint.restore import _of_controller
from ddk_ds.train.state import RunState
from tests.unit.mixture.mixture_section import config_with, section

SIZES = {"code": 100, "maths": 300, "prose": 600}
NEW = ("ado", "odm", "loss_softmax", "kl_gap")
Measured = list[list[float]]


def build(kind: str, **options: Any) -> Controller:
    return make_controller(section(kind, **options), SIZES)


def decisions(
    controller: Controller, losses: Measured, steps: int = 10, teacher: Any = None, *, through_json: bool = False
) -> list[Decision]:
    """Decide on one interval for each row of losses; each has so many `steps` of 100 tokens."""
    made: list[Decision] = []
    for interval, row in enumerate(losses):
        last = made[-1] if made else None
        if last is not None and through_json:
            last = Decision(**json.loads(json.dumps(asdict(last), allow_nan=False)))
        done = steps * interval
        made.append(decide(controller, last, np.exp(row), teacher, interval=interval, step=done, tokens=100 * done))
    return made


def laws(count: int, exponents: Any = (0.2, 0.5, 0.7), scales: Any = (8.0, 40.0, 9.0)) -> Measured:
    """Return losses of three domains that follow a power law of the tokens; the first row is of no token."""
    tokens = 1000.0 * np.arange(1, count)
    falling = 1.5 + np.array(scales) * tokens[:, None] ** -np.array(exponents)
    return [[9.0, 9.0, 9.0], *falling.tolist()]


@pytest.mark.parametrize(("irreducible", "scale", "exponent"), [(1.5, 8.0, 0.2), (0.0, 30.0, 0.45), (2.5, 90.0, 0.77)])
def test_a_power_law_is_found_as_scipy_finds_it(irreducible: float, scale: float, exponent: float) -> None:
    tokens = [1000 * n for n in (1, 2, 3, 5, 8, 13, 21, 34)]
    wobble = 1 + 2e-3 * np.array([1, -1, 0.5, 0, -0.5, 1, -1, 0])
    for noise in (np.ones(8), wobble):
        losses = (irreducible + scale * np.array(tokens, float) ** -exponent) * noise

        def residuals(law: Any, losses: Any = losses) -> Any:
            return (law[0] + np.exp(law[1]) * np.array(tokens, float) ** -law[2]) - losses

        bounds = ([0, -5, 0.01], [9, 9, 0.8])
        start = [irreducible + 0.1, math.log(scale), exponent]
        theirs = least_squares(residuals, start, bounds=bounds, x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15)
        ours = fit_law(tokens, losses)
        assert ours is not None
        mine = residuals([ours.irreducible, math.log(ours.scale), ours.exponent])
        assert mine @ mine <= 2 * theirs.cost * (1 + 1e-3) + 1e-9
        if noise is not wobble:
            assert ours == pytest.approx((irreducible, scale, exponent), rel=2e-3, abs=2e-3)


def test_a_loss_that_rises_or_stays_has_no_law() -> None:
    assert fit_law([10, 20, 30, 40], [2.0, 2.1, 2.2, 2.3]) is None
    assert fit_law([10, 20, 30, 40], [2.0] * 4) is None
    assert fit_law([10, 20, 30, 40], [0.0] * 4) is None


def test_ados_policy_is_the_papers() -> None:
    """Its steps are done one by one, with the laws that made the losses; delta_min is too small to matter."""
    exponents, scales, mu, steps = np.array([0.2, 0.5, 0.7]), np.array([8.0, 40.0, 9.0]), np.array([0.1, 0.3, 0.6]), 10
    made = decisions(build("ado", prior="by_size", min_proportion=0.0), laws(9), steps)
    policy, history, total, count = mu, mu, np.zeros(3), 0
    for interval in range(9):
        rho = mu
        if interval >= 3:
            n = 1000.0 * interval
            speed = exponents * scales * n**-exponents / n
            rho = mu * history**0.5 * speed
            rho = rho / rho.sum()
            policy = 0.1 * rho + 0.9 * total / count
        np.testing.assert_allclose(made[interval].proportions, policy, rtol=2e-3)
        for _ in range(steps):
            history = 0.1 * policy + 0.9 * history
            total, count = total + rho, count + 1


def test_ado_keeps_a_domains_last_law_and_shares_the_mean_speed_before_there_is_one() -> None:
    losses = laws(9)
    falling = decisions(build("ado"), losses)
    for row in losses[6:]:
        row[0] = 50.0 + row[0]  # so high that no law that falls fits
    for row in range(1, 9):
        losses[row][2] = 2.0 + row
    made = decisions(build("ado"), losses)
    assert made[8].memory is not None and falling[5].memory is not None
    assert made[8].memory["laws"][0] == falling[5].memory["laws"][0]
    assert made[8].memory["laws"][1] == pytest.approx((1.5, 40.0, 0.5), rel=2e-2)
    assert made[8].memory["laws"][2] is None
    only = decisions(build("ado"), [[2.0 + t] * 3 for t in range(6)])
    np.testing.assert_allclose(only[5].proportions, [1 / 3] * 3)


def test_ado_gives_every_domain_its_least_preference_and_forgets_old_measurements() -> None:
    made = decisions(build("ado", policy_weight=1.0, min_proportion=0.2), laws(6, scales=(8.0, 4e-6, 9.0)))
    assert min(made[-1].proportions) == pytest.approx(0.2) == made[-1].proportions[1]
    long = decisions(build("ado"), laws(OBSERVATIONS + 10))[-1].memory
    assert long is not None and len(long["tokens"]) == len(long["losses"]) == OBSERVATIONS
    assert long["tokens"][-1] == 1000 * (OBSERVATIONS + 9)
    with pytest.raises(ConfigError, match=r"min_proportion is 0.4 for 3 domains: give a number between 0 and 1/3"):
        build("ado", min_proportion=0.4)
    with pytest.raises(ConfigError, match="warmup_intervals"):
        build("ado", warmup_intervals=2)


def test_odm_is_exp3_step_by_step() -> None:
    """Algorithm 1 with an interval's loss at each of its steps."""
    losses, steps, mu = (
        [[2.0, 3.0, 4.0], [2.0, 2.5, 4.0], [1.5, 2.5, 3.0], [1.0, 2.0, 3.0]],
        40,
        np.array([0.1, 0.3, 0.6]),
    )
    made = decisions(build("odm", prior="by_size"), losses, steps)
    rewards, policy, last = np.zeros(3), mu, 1 / 3
    np.testing.assert_allclose(made[0].proportions, mu)
    for interval in range(1, 4):
        for _ in range(steps):
            rewards = 0.9 * rewards + 0.1 * np.array(losses[interval]) / policy
        now = min(1 / 3, math.sqrt(math.log(3) / (3 * steps * interval)))
        weights = np.exp(last * rewards)
        policy, last = (1 - 3 * now) * weights / weights.sum() + now, now
        np.testing.assert_allclose(made[interval].proportions, policy, rtol=1e-12)


def test_odm_comes_to_rest_where_its_rewards_are_its_own() -> None:
    """R = loss / pi, and of two domains the log ratio of what is above eps is eps times the difference of R."""
    code, maths, prose = decisions(build("odm"), [[1.0, 1.0, 5.0]] * 30, 100)[-1].proportions
    rate = math.sqrt(math.log(3) / (3 * 2900))
    assert prose > 1 / 3 > code == maths
    assert math.log((prose - rate) / (code - rate)) == pytest.approx(rate * (5 / prose - 1 / code), rel=0.05)
    alone = make_controller(section("odm"), {"code": 1})
    assert [one.proportions for one in decisions(alone, [[2.0], [3.0]])] == [[1.0], [1.0]]


def test_boltzmann_by_hand() -> None:
    """exp(1), exp(2), exp(3) with equal and other priors; the gap in nats is log 2, log 3, log 6."""
    equal = build("loss_softmax").start(np.exp([1.0, 2.0, 3.0]), None).proportions
    np.testing.assert_allclose(equal, np.exp([1, 2, 3]) / np.exp([1, 2, 3]).sum())
    tilted = build("loss_softmax", prior="by_size", temperature=2.0).start(np.exp([1.0, 2.0, 3.0]), None).proportions
    weights = np.array([0.1, 0.3, 0.6]) * np.exp([0.5, 1.0, 1.5])
    np.testing.assert_allclose(tilted, weights / weights.sum())
    gap = build("kl_gap").update(np.zeros(3), [6.0, 30.0, 600.0], [3.0, 10.0, 100.0], interval=7).proportions
    np.testing.assert_allclose(gap, np.array([2, 3, 6]) / 11)
    none_left = build("kl_gap", prior={"code": 0.0, "maths": 0.5, "prose": 0.5})
    assert none_left.start([9.0, 2.0, 2.0], [1.0, 1.0, 1.0]).proportions.tolist() == [0.0, 0.5, 0.5]


def test_a_weak_students_gap_in_nats_is_not_one_hot() -> None:
    """Ratios of 5 and 40: DDK gives the second all but e^-35, in nats it has 40 / 50."""
    student, teacher = [10.0, 5.0 * 4, 40.0 * 4], [2.0, 4.0, 4.0]
    assert build("ddk").start(student, teacher).proportions[2] > 1 - 1e-12
    np.testing.assert_allclose(build("kl_gap").start(student, teacher).proportions, [0.1, 0.1, 0.8])


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("bounds", [{}, {"exclude": ("maths",), "floors": {"prose": 0.45}}])
def test_a_resumed_run_decides_as_an_uninterrupted_one_within_its_bounds(kind: str, bounds: dict[str, Any]) -> None:
    losses, teacher = laws(8), [2.0, 2.0, 2.0]
    made = decisions(build(kind, **bounds), losses, teacher=teacher)
    assert decisions(build(kind, **bounds), losses, teacher=teacher, through_json=True) == made
    for one in made:
        assert sum(one.proportions) == pytest.approx(1) and min(one.proportions) >= 0
        assert not bounds or (one.proportions[1] == 0 and one.proportions[2] >= 0.45)


def test_means_of_an_interval_by_hand() -> None:
    """A domain without a token keeps its last values; one never drawn has its held-out loss and the others' mean KL."""
    first = interval_means([[10, 0, 5], [20.0, 0.0, 15.0], [1.0, 0.0, 2.0]], [])
    assert first == [[2.0, None, 3.0], [0.1, None, 0.4]]
    second = interval_means([[0, 0, 2], [0.0, 0.0, 5.0], [0.0, 0.0, 1.0]], first)
    assert second == [[2.0, None, 2.5], [0.1, None, 0.5]]
    losses, divergences = filled(second, np.array([9.0, 8.0, 7.0]))
    np.testing.assert_allclose([losses, divergences], [[2.0, 8.0, 2.5], [0.1, 0.3, 0.5]])


def test_the_kl_of_training_tilts_the_prior_after_the_first_interval() -> None:
    controller = build("kl_gap", measure="kl", source="training", prior="by_size", temperature=0.5)
    held_out: Any = (np.array([9.0, 9.0, 9.0]), [1.0, 2.0, 3.0])
    first = decide(controller, None, *held_out, interval=0)
    np.testing.assert_allclose(first.proportions, [0.1, 0.3, 0.6])
    training = [[2.0, 2.0, 2.0], [0.5, 1.0, 2.0]]
    weights = np.array([0.1, 0.3, 0.6]) * np.exp([1.0, 2.0, 4.0])
    second = decide(controller, first, *held_out, interval=1, training=training)
    np.testing.assert_allclose(second.proportions, weights / weights.sum())
    fewer = build("kl_gap", measure="kl", source="training", exclude=("maths",))
    decided = decide(fewer, first, *held_out, interval=1, training=training)
    np.testing.assert_allclose(decided.proportions, np.exp([0.5, -np.inf, 2.0]) / np.exp([0.5, 2.0]).sum())
    with pytest.raises(DataError, match=r"mixture.source is training, and nothing was measured .* before interval 1"):
        decide(controller, first, *held_out, interval=1)
    with pytest.raises(DataError, match="divergence from the teacher of domain 'prose' is inf"):
        decide(controller, first, *held_out, interval=1, training=[[2.0] * 3, [0.5, 1.0, math.inf]])


def test_losses_of_training_take_the_held_out_ones_place() -> None:
    first = decisions(build("odm", source="training"), [[1.0, 2.0, 3.0]])[0]
    known: Any = {"interval": 1, "step": 30, "tokens": 100}
    training = [[1.0, 5.0, None], [0.0, 0.0, None]]
    by_training = decide(
        build("odm", source="training"), first, np.exp([9.0, 9.0, 3.0]), None, **known, training=training
    )
    held_out = decide(build("odm"), first, np.exp([1.0, 5.0, 3.0]), None, **known)
    np.testing.assert_allclose(by_training.proportions, held_out.proportions)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"controller": "ddk", "source": "training"}, "source is training, which controller: ddk does not use"),
        ({"controller": "kl_gap", "measure": "kl"}, "measure: kl is known from training alone: set source: training"),
        ({"controller": "kl_gap", "source": "training"}, "no losses of the teacher: set measure: kl"),
        ({"controller": "sheared_llama", "source": "training"}, "no losses of the teacher: set reference_losses"),
        ({"controller": "loss_softmax", "source": "training", "ppl_smoothing": 0.5}, "ppl_smoothing is 0.5, and"),
    ],
)
def test_a_source_without_what_the_controller_needs_is_refused(mixture: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_with(mixture)


def test_the_kl_of_training_needs_a_divergence_in_the_loss() -> None:
    by_kl = {"controller": "kl_gap", "measure": "kl", "source": "training"}
    assert config_with(by_kl).mixture.measure == "kl"
    for loss in ({"gamma": 0.0}, {"gamma_end": 0.0}, {"divergence": "reverse_kl"}):
        with pytest.raises(ConfigError, match=r"measure: kl is the divergence in the loss: it needs a teacher"):
            config_with(by_kl, loss=loss)


def test_a_state_adds_up_the_losses_of_an_interval_and_an_older_one_has_none() -> None:
    entries: Any = [{"name": name, "num_samples": 9, "sha": "0"} for name in SIZES]
    state = RunState(IntervalState.new(entries, seed=0))
    older = {key: value for key, value in state.to_json().items() if "training" not in key and "memory" not in key}
    assert RunState.from_json(json.loads(json.dumps(older))) == state and state.measured_in_training is None
    state.add_losses([1, 0, 3], [2.0, 0.0, 6.0, 0.5, 0.0, 1.5])
    state.add_losses([1, 0, 3], [2.0, 0.0, math.nan, 0.5, 0.0, 1.5])  # a skipped step
    state.add_losses([1, 2, 0], [3.0, 8.0, 0.0, 0.5, 1.0, 0.0])
    state.add_losses([5, 5, 5], [])  # nobody asked for them
    assert state.training_sums == [[2, 2, 3], [5.0, 8.0, 6.0], [1.0, 1.0, 1.5]]
    assert RunState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert state.measured_in_training == [[2.5, 4.0, 2.0], [0.5, 0.5, 0.5]]


def test_a_fork_keeps_a_controller_that_remembers() -> None:
    assert _of_controller({"mixture.controller": "ddk"}) == ()
    assert _of_controller({"mixture.controller": "ado"}) == ("mixture.controller", "mixture.exclude")
    assert "mixture.source" in _of_controller({"mixture.controller": "odm", "mixture.source": "training"})


@pytest.mark.parametrize("kind", ["ado", "odm"])
def test_a_memory_that_is_not_there_or_not_its_own_is_refused(kind: str) -> None:
    last = decisions(build(kind), laws(2))[-1]
    other = "odm" if kind == "ado" else "ado"
    measured: Any = (np.ones(3), None)
    with pytest.raises(DataError, match=f"controller {kind} continues from .* kept controller None"):
        decide(build(kind), Decision(last.proportions, [], last.log_proportions), *measured, interval=2)
    with pytest.raises(DataError, match=f"controller {other} continues from .* kept controller {kind}"):
        decide(build(other), last, *measured, interval=2)
    with pytest.raises(DataError, match=r"about code, prose, and .* kept domains"):
        decide(build(kind, exclude=("maths",)), last, *measured, interval=2)
    with pytest.raises(DataError, match="perplexity of domain 'maths' is nan"):
        decide(build(kind), last, np.array([2.0, math.nan, 2.0]), None, interval=2)
