"""The border between two intervals: what ends a run there, its line of the ledger, and the schedule's file."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk_ds.comm import SingleProcess
from ddk_ds.errors import CheckpointError, ConfigError
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.exhaustion import Draws
from ddk_ds.mixture.interval_state import IntervalState
from ddk_ds.mixture.order import DomainOrder
from ddk_ds.train.interval import Mixer, interval_record, ratio_to_teacher, read_schedule, stop_reason
from ddk_ds.train.state import RunState
from tests.unit.mixture.mixture_section import config_with, section

SIZES = {"code": 40, "law": 20, "prose": 60}


def state_of(step: int = 0, interval: int = -1) -> RunState:
    """Return the state of a run over `SIZES` at the end of an interval."""
    entries: Any = [{"name": name, "num_samples": size, "sha": "0"} for name, size in SIZES.items()]
    return RunState(data=replace(IntervalState.new(entries, seed=3), interval=interval), step=step)


def ends(stop: dict[str, Any], state: RunState, ratios: Any = (2.0, 2.0, 2.0), **mixture: Any) -> bool:
    """Return True if a run with this section `stop` ends; the teacher's perplexities are 10, the batch has 4."""
    teacher = np.full(3, 10.0)
    return stop_reason(config_with(mixture, stop=stop), state, np.array(ratios) * teacher, teacher) is not None


def test_a_run_ends_at_the_first_border_that_reaches_its_end() -> None:
    assert [ends({"steps": 9}, state_of(step)) for step in (8, 9, 10)] == [False, True, True]
    assert [ends({"intervals": 3}, state_of(interval=done - 1)) for done in (0, 2, 3, 4)] == [False, False, True, True]
    # 120 samples are 30 steps of 4; without law they are 100, which are 25 steps.
    assert [ends({"data_once": True}, state_of(step)) for step in (29, 30, 31)] == [False, True, True]
    assert [ends({"data_once": True}, state_of(step), exclude=["law"]) for step in (24, 25)] == [False, True]
    assert ends({"steps": 100, "data_once": True}, state_of(30)) and ends({"steps": 9, "intervals": 99}, state_of(9))


def test_a_run_whose_data_are_used_says_how_often_the_least_and_most_drawn_domain_was() -> None:
    """Of 40, 20 and 60 samples, 20, 40 and 60 were drawn: half, twice and once."""
    state = state_of(30)
    state.data = state.data.begin([20, 40, 60], [0.0] * 3)
    reason = stop_reason(config_with({}, stop={"data_once": True}), state, np.ones(3), np.ones(3))
    assert reason is not None and reason.endswith(": code 0.50 times over, law 2.00 times over")
    excluding = config_with({"exclude": ["law"]}, stop={"data_once": True})
    reason = stop_reason(excluding, state, np.ones(3), np.ones(3))
    assert reason is not None and reason.endswith(": code 0.50 times over, prose 1.00 times over")


def test_a_run_ends_when_its_student_is_near_the_teacher_in_every_drawn_domain() -> None:
    """The largest ratio less 1 is 0.25, exactly in float64."""
    stop = {"steps": 100, "discrepancy": 0.25}
    assert not ends(stop, state_of(), (1.0, 1.25, 1.125))
    assert ends({**stop, "discrepancy": 0.2500001}, state_of(), (1.0, 1.25, 1.125))
    assert ends(stop, state_of(), (1.0, 9.0, 1.125), exclude=["law"])
    assert not ends(stop, state_of(), (9.0, 1.0, 1.125), exclude=["law"])
    assert stop_reason(config_with({}, stop={"steps": 100, "discrepancy": 9.0}), state_of(), np.ones(3), None) is None


def test_the_ratio_is_the_students_over_the_teachers() -> None:
    assert ratio_to_teacher(np.array([6.0, 5.0]), np.array([2.0, 4.0])).tolist() == [3.0, 1.25]  # type: ignore[union-attr]
    assert ratio_to_teacher(np.ones(2), None) is None


def mixer_of(state: RunState) -> Mixer:
    """Return DDK's mixer over `SIZES`, with one shard for each domain."""
    seed = state.data.seed
    orders = [DomainOrder(name, [size], seed) for name, size in SIZES.items()]
    return Mixer(make_controller(section(alpha=0.5), SIZES), orders, np.array([0, 40, 60]), SingleProcess())


def test_an_interval_is_decided_begun_and_written_down() -> None:
    """Eq. 1 of equal ratios is a third each; Eq. 2 then follows the ratios 3, 2, 2: e / (e + 2) for the first."""
    state, teacher = state_of(), np.full(3, 10.0)
    mixer = mixer_of(state)
    decision = mixer.decide(state, 2 * teacher, teacher)
    assert decision.proportions == pytest.approx([1 / 3] * 3)
    assert state == state_of(), "deciding changes nothing"
    draws = Draws((5, 4, 3), (6, 3, 3), (0.5, -0.25, -0.25))
    ids = mixer.begin(state, decision, draws)
    assert sorted(np.searchsorted([40, 60], ids, "right").tolist()) == [0] * 6 + [1] * 3 + [2] * 3
    assert len(set(ids.tolist())) == 12 and state.proportions == decision.proportions
    assert (state.data.interval, state.data.counts, state.data.consumed) == (0, (6, 3, 3), 0)
    again = replace(state, data=replace(state.data, ids_sha=""))
    assert mixer.ids(again).tolist() == ids.tolist() and again.data.ids_sha == state.data.ids_sha != ""
    with pytest.raises(CheckpointError, match="sample order"):
        mixer.ids(replace(state, data=replace(state.data, ids_sha="0" * 16)))
    following = mixer.decide(state, np.array([30.0, 20.0, 20.0]), teacher)
    psi = np.exp([3.0, 2.0, 2.0]) / np.exp([3.0, 2.0, 2.0]).sum()
    assert following.proportions == pytest.approx((0.5 * psi + 0.5 / 3).tolist(), rel=1e-12)

    state.step, state.domain_tokens = 7, [10, 20, 30]
    clock = {"student_s": 1.23456789, "decision_s": 0.00004}
    line = interval_record("interval", state, list(SIZES), 2 * teacher, teacher, clock, ["beware"], draws.asked)
    expected = {
        "kind": "interval",
        "interval": 0,
        "step": 7,
        "student_ppl": {"code": 20.0, "law": 20.0, "prose": 20.0},
        "ratio": {"code": 2.0, "law": 2.0, "prose": 2.0},
        "smoothed_ppl": None,
        "asked": {"code": 5, "law": 4, "prose": 3},
        "counts": {"code": 6, "law": 3, "prose": 3},
        "owed": {"code": 0.5, "law": -0.25, "prose": -0.25},
        "domain_tokens": {"code": 10, "law": 20, "prose": 30},
        "ids_sha": state.data.ids_sha,
        "alarms": ["beware"],
        "clock": {"student_s": 1.2346, "decision_s": 0.0},
    }
    assert {key: line[key] for key in expected} == expected
    assert list(line["proportions"].values()) == pytest.approx([1 / 3] * 3)
    assert list(line["log_proportions"].values()) == pytest.approx([-math.log(3)] * 3)
    state.smoothed_ppl = [1.0, 2.0, 3.0]
    line = interval_record("interval", state, list(SIZES), teacher, None, {}, (), draws.asked)
    assert line["smoothed_ppl"] == {"code": 1.0, "law": 2.0, "prose": 3.0} and line["ratio"] is None
    last = interval_record("end", state, list(SIZES), teacher, teacher, {})
    begun = ("smoothed_ppl", "proportions", "log_proportions", "asked", "counts", "owed", "ids_sha")
    assert [last[key] for key in begun] == [None] * 7 and last["domain_tokens"] == line["domain_tokens"]


def test_each_interval_has_its_own_number() -> None:
    """A schedule says by interval what comes next: 0, 1, 2 and 3 have other proportions each."""
    rows = [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5], [0.0, 0.5, 0.5]]
    stages = [{"from_interval": t, "proportions": dict(zip(SIZES, row, strict=True))} for t, row in enumerate(rows)]
    controller = make_controller(section("schedule", schedule_file="stages.yaml"), SIZES, stages)
    orders = [DomainOrder(name, [size], 3) for name, size in SIZES.items()]
    mixer, state = Mixer(controller, orders, np.array([0, 40, 60]), SingleProcess()), state_of()
    for row in rows:
        decision = mixer.decide(state, np.ones(3), np.ones(3))
        assert decision.proportions == row
        mixer.begin(state, decision, Draws((4, 4, 4), (4, 4, 4), (0.0, 0.0, 0.0)))
        state.data = state.data.consume(12)


def test_a_schedules_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "stages.yaml"
    assert read_schedule(None) is None
    with pytest.raises(ConfigError, match=r"stages.yaml: cannot be read as YAML: No such file or directory"):
        read_schedule(str(path))
    for content in (b"a: [1", b"\xff\xfe\xfa"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"mixture.schedule_file .*stages.yaml: cannot be read as YAML"):
            read_schedule(str(path))
    path.write_text("- {from_interval: 0}")
    assert read_schedule(str(path)) == [{"from_interval": 0}]
