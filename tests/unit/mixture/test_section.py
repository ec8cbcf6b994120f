"""Section `mixture` of a configuration and its effects on a run: options by controller, intervals, resumption."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ddk_ds.comm import SingleProcess
from ddk_ds.config import to_yaml
from ddk_ds.config.load import load_config
from ddk_ds.config.mixture_options import Mixture
from ddk_ds.config.run_config import corpus_samples, interval_steps, total_steps
from ddk_ds.errors import CheckpointError, ConfigError
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.decide import Controller, Decision, decide
from ddk_ds.mixture.interval_state import DomainEntry, IntervalState
from ddk_ds.mixture.order import DomainOrder
from ddk_ds.train.interval import Mixer, interval_record, stop_reason
from ddk_ds.train.loop import _interval_samples
from ddk_ds.train.state import RunState
from tests.unit.mixture.mixture_section import config_with as config
from tests.unit.mixture.mixture_section import exhaustion_of, section

NAMES = ["code", "law", "prose"]


@pytest.mark.parametrize(
    ("mixture", "parts"),
    [
        ({"controller": "equal", "prior": "by_size"}, ["prior is by_size", "controller: equal does not use", "ddk or"]),
        ({"controller": "ddk", "step_size": 2.0}, ["step_size is 2.0", "doremi_online"]),
        ({"controller": "sheared_llama", "smoothing": 0.1}, ["smoothing is 0.1", "doremi_online"]),
        ({"controller": "ddk", "reference_losses": {"code": 1.0}}, ["reference_losses", "sheared_llama or"]),
        ({"controller": "by_size", "ppl_smoothing": 0.5}, ["ppl_smoothing is 0.5"]),
        ({"controller": "equal", "floors": {"code": 0.5}}, ["floors is {'code': 0.5}", "by_size"]),
        ({"controller": "ddk_no_smoothing", "initial": "equal"}, ["initial is equal", "to ddk"]),
        ({"controller": "ddk", "schedule_file": "/x.yaml"}, ["schedule_file is /x.yaml", "to schedule"]),
        ({"controller": "schedule"}, ["controller: schedule needs mixture.schedule_file"]),
        ({"controller": "by_size", "proportions": {"code": 1.0}}, ["proportions is {'code': 1.0}", "to static"]),
        ({"controller": "static"}, ["controller: static needs mixture.proportions"]),
        ({"exhaustion": "halt"}, ["mixture.exhaustion", "'cycle', 'cap' or 'stop'", "'halt'"]),
        ({"initial": "equal", "initial_floor": 0.1}, ["initial_floor is 0.1", "initial: equal does not use"]),
        ({"prior": "size"}, ["mixture.prior", "'size'"]),
        ({"ppl_smoothing": 1.0}, ["mixture.ppl_smoothing", "1.0"]),
        ({"interval_growth": 0.0}, ["mixture.interval_growth", "0.0"]),
        ({"floors": {"code": 1.5}}, ["mixture.floors.code", "1.5"]),
    ],
)
def test_an_option_that_nothing_uses_is_an_error(mixture: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config(mixture)
    for part in ["run.yaml: mixture", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "mixture",
    [
        {"controller": "ddk", "prior": {"code": 1.0}, "floors": {"code": 0.5}, "exclude": ["law"], "initial": "equal"},
        {"controller": "doremi_online", "step_size": 0.5, "smoothing": 0.1, "reference_losses": {"code": 1.5}},
        {"controller": "schedule", "schedule_file": "stages.yaml", "interval_growth": 1.25},
    ],
)
def test_options_survive_being_written(mixture: dict[str, Any], tmp_path: Path) -> None:
    given = config(mixture)
    (tmp_path / "run.yaml").write_text(to_yaml(given))
    assert load_config(tmp_path / "run.yaml") == given


def test_intervals_grow_and_shrink() -> None:
    def lengths(growth: float, steps: int = 10) -> list[int]:
        mixture = Mixture(interval_steps=steps, interval_growth=growth)
        return [interval_steps(mixture, t) for t in range(6)]

    assert lengths(1.0) == [10] * 6
    assert lengths(2.0) == [10, 20, 40, 80, 160, 320]
    assert lengths(0.5) == [10, 5, 2, 1, 1, 1]  # 2.5 and 1.25 are rounded to 2 and 1, 0.6 and less to 1
    assert lengths(1.1, 1000) == [1000, 1100, 1210, 1331, 1464, 1611]
    assert interval_steps(Mixture(interval_growth=3.0), 10_000) > 10**12  # and no overflow


@pytest.mark.parametrize("growth", [1.0, 1.5, 0.7])
def test_a_runs_end_is_the_sum_of_its_intervals(growth: float) -> None:
    mixture = {"interval_steps": 7, "interval_growth": growth}
    lengths = [interval_steps(Mixture(**mixture), t) for t in range(50)]  # type: ignore[arg-type]
    assert total_steps(config(mixture, stop={"intervals": 5}), 10**6) == sum(lengths[:5])
    once = config(mixture, stop={"data_once": True})
    for samples in (1, 27, 28, 29, 56, 57, 200):
        needed = next(n for n in range(1, 50) if 4 * sum(lengths[:n]) >= samples)
        assert total_steps(once, samples) == sum(lengths[:needed])
    assert total_steps(config(mixture, stop={"intervals": 5, "steps": 9}), 1) == 9


def entries(sizes: list[int]) -> list[DomainEntry]:
    return [DomainEntry(name=name, num_samples=size, sha="0") for name, size in zip(NAMES, sizes, strict=True)]


def test_an_excluded_domain_counts_in_no_stop() -> None:
    sizes = [40, 500, 60]
    state = RunState(IntervalState.new(entries(sizes), seed=0).begin([10, 0, 90], [0.0] * 3).consume(100), step=25)
    measured = np.array([2.02, 9.0, 3.0]), np.array([2.0, 3.0, 3.0])
    stop = {"data_once": True}
    assert stop_reason(config({}, stop=stop), state, *measured) is None
    excluding = config({"exclude": ["law"]}, stop=stop)
    assert stop_reason(excluding, state, *measured) == (
        "100 samples drawn, as many as the data has (100) or more: code 0.25 times over, prose 1.50 times over"
    )
    assert corpus_samples(excluding.mixture, dict(zip(NAMES, sizes, strict=True))) == 100
    stop = {"steps": 1000, "discrepancy": 0.05}
    assert stop_reason(config({}, stop=stop), state, *measured) is None
    assert "discrepancy 0.01" in str(stop_reason(config({"exclude": ["law"]}, stop=stop), state, *measured))


OPTIONS = section(ppl_smoothing=0.6, exclude=("law",), floors={"code": 0.3}, prior="by_size")
SIZES = {"code": 40, "law": 50, "prose": 60}


def make_mixer(controller: Controller) -> Mixer:
    orders = [DomainOrder(name, [size], 0) for name, size in SIZES.items()]
    sizes = np.array(list(SIZES.values()))
    return Mixer(controller, orders, np.cumsum(sizes) - sizes, SingleProcess())


def run_intervals(state: RunState, intervals: range, controller: Controller | None = None) -> list[dict[str, Any]]:
    """Plan, begin and train these intervals from `state`; return their lines of the ledger."""
    mixer = make_mixer(controller or make_controller(OPTIONS, SIZES))
    records, teacher = [], np.array([3.0, 12.0, 5.0])
    for t in intervals:
        student = np.array([9.0, 30.0, 12.0]) / (1 + 0.2 * t) + np.array([0.0, 1.0, t % 2])
        decision = mixer.decide(state, student, teacher)
        draws = exhaustion_of(SIZES).draws(decision.proportions, 20, state.data.drawn, state.data.owed)
        mixer.begin(state, decision, draws)
        records.append(interval_record("interval", state, NAMES, student, teacher, {}, [], draws.asked))
        state.data = state.data.consume(20)
    return records


def fresh() -> RunState:
    return RunState(IntervalState.new(entries([40, 50, 60]), seed=0), domain_tokens=[0] * 3)


def test_smoothed_perplexities_are_carried_over_a_resume_and_a_replay() -> None:
    whole = run_intervals(fresh(), range(5))
    state = fresh()
    run_intervals(state, range(2))
    resumed = RunState.from_json(json.loads(json.dumps(state.to_json())))
    assert run_intervals(resumed, range(2, 5)) == whole[2:]

    controller = make_controller(OPTIONS, SIZES)
    last: Decision | None = None
    for line in map(json.loads, map(json.dumps, whole)):
        student, teacher = (np.array(list(line[key].values())) for key in ("student_ppl", "teacher_ppl"))
        last = decide(controller, last, student, teacher, interval=line["interval"])
        assert dict(zip(NAMES, last.proportions, strict=True)) == line["proportions"]
        assert dict(zip(NAMES, last.smoothed_ppl, strict=True)) == line["smoothed_ppl"]


def test_a_run_follows_its_schedule() -> None:
    stages = [{"from_interval": t, "proportions": dict.fromkeys(NAMES, 0.0) | {NAMES[t]: 1.0}} for t in range(3)]
    controller = make_controller(section("schedule", schedule_file="stages.yaml"), SIZES, stages)
    lines = run_intervals(fresh(), range(4), controller)
    assert [list(line["counts"].values()) for line in lines] == [[20, 0, 0], [0, 20, 0], [0, 0, 20], [0, 0, 20]]


def test_the_plan_of_an_interval_has_its_own_length() -> None:
    options = config({"controller": "equal", "interval_steps": 3, "interval_growth": 2.0}, stop={"steps": 20})
    run: Any = SimpleNamespace(config=options, state=fresh(), total_steps=20)
    run.mixer = make_mixer(make_controller(section("equal"), SIZES))
    exhaustion, steps = exhaustion_of(SIZES), []
    for _ in range(3):
        decision, samples = run.mixer.decide(run.state, np.ones(3), None), _interval_samples(run)
        data = run.state.data
        run.mixer.begin(run.state, decision, exhaustion.draws(decision.proportions, samples, data.drawn, data.owed))
        steps.append(samples // 4)
        run.state.step += steps[-1]
        run.state.data = run.state.data.consume(samples)
    assert steps == [3, 6, 11]  # the last would have 12, and the run has 11 left


def test_a_decision_changes_nothing() -> None:
    """A run that ends at a domain's limit saves the state before its decision, so that a fork can continue from it."""
    state = fresh()
    run_intervals(state, range(2))
    before = json.dumps(state.to_json())
    mixer = make_mixer(make_controller(OPTIONS, SIZES))
    mixer.decide(state, np.array([5.0, 6.0, 7.0]), np.array([3.0, 12.0, 5.0]))
    assert json.dumps(state.to_json()) == before


def test_a_state_with_other_fields_is_refused() -> None:
    record = fresh().to_json()
    for other in ({key: value for key, value in record.items() if key != "smoothed_ppl"}, {**record, "extra": 1}):
        with pytest.raises(CheckpointError, match=r"missing or unknown fields: \['(smoothed_ppl|extra)'\]"):
            RunState.from_json(other)
