"""Every benchmark gives models their known scores."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ddk_ds.evaluation import harness
from ddk_ds.evaluation.results import Score
from ddk_ds.evaluation.suites import BENCHMARKS, SUITES, choose_benchmarks
from tests.unit.evaluation.benchmarks import DOCUMENTS, Knower

SUBJECTS = {"ceval": 52, "mmlu": 57}


@pytest.fixture(scope="module")
def paper(bwrap: None, benchmark_files: Path) -> list[harness.Loaded]:
    return [harness.load_tasks(chosen, benchmark_files) for chosen in choose_benchmarks("paper", None)]


def scores(model: Knower, benchmarks: list[harness.Loaded]) -> dict[str, Score]:
    return {loaded.chosen.benchmark.name: harness.run_benchmark(model, loaded, None) for loaded in benchmarks}


def test_who_knows_all_has_all_and_who_knows_nothing_has_none(paper: list[harness.Loaded]) -> None:
    right = scores(Knower(lambda _number: True), paper)
    wrong = scores(Knower(lambda _number: False), paper)
    assert list(right) == list(BENCHMARKS)
    for name in BENCHMARKS:
        assert (right[name].value, wrong[name].value) == (1.0, 0.0), name
        assert right[name].stderr == wrong[name].stderr == 0.0, name
        assert right[name].documents == (2 * SUBJECTS[name] if name in SUBJECTS else DOCUMENTS)
        assert right[name].shots == (3 if name == "mbpp" else 0)


def test_who_knows_one_of_four_has_a_quarter(paper: list[harness.Loaded]) -> None:
    found = scores(Knower(lambda number: number == 0), paper)
    for name, score in found.items():
        assert score.value == pytest.approx(0.5 if name in SUBJECTS else 0.25), name
    # The sample standard deviation of (1, 0, 0, 0) is 1/2, which is divided by the root of 4.
    for name in ("arc_easy", "gsm8k", "humaneval", "race", "c3"):
        assert found[name].stderr == pytest.approx(0.25), name
    # Each subject has two documents, one answered correctly: the pooled variance divided by the number of documents.
    assert found["mmlu"].stderr == pytest.approx(math.sqrt(0.5 / (2 * SUBJECTS["mmlu"])))
    assert found["arc_easy"].more["acc,none"] == pytest.approx(0.25)


@pytest.mark.usefixtures("no_network")
def test_five_examples_go_before_each_question(benchmark_files: Path) -> None:
    marks = {"ceval": "\n答案", "mmlu": "Answer:", "gsm8k": "Question:", "arc_easy": "Question:"}
    marks["arc_challenge"] = "Answer:"
    wanted = choose_benchmarks("paper-5shot", None)
    assert [chosen.benchmark.name for chosen in wanted] == list(marks)
    for chosen in wanted:
        loaded = harness.load_tasks(chosen, benchmark_files)
        first, second = Knower(lambda _number: True), Knower(lambda _number: True)
        for model in (first, second):
            assert harness.run_benchmark(model, loaded, 1).value == 1.0
        assert {prompt.count(marks[chosen.benchmark.name]) for prompt in first.prompts} == {6}
        assert first.prompts == second.prompts, "two models must see the same examples"


def test_mbpp_shows_three_solved_tasks(paper: list[harness.Loaded]) -> None:
    (mbpp,) = (loaded for loaded in paper if loaded.chosen.benchmark.name == "mbpp")
    model = Knower(lambda _number: True)
    harness.run_benchmark(model, mbpp, 1)
    (prompt,) = model.prompts
    assert prompt.count("[DONE]") == 3 and prompt.count("[BEGIN]") == 4
    assert all(f"def times_{number}" in prompt for number in (2, 3, 4)) and "def times_0" not in prompt


def test_a_limit_takes_the_first_of_each_subject(paper: list[harness.Loaded]) -> None:
    for loaded in paper:
        name = loaded.chosen.benchmark.name
        if name in ("ceval", "arc_easy"):
            score = harness.run_benchmark(Knower(lambda number: number == 0), loaded, 1)
            assert (score.value, score.documents, score.stderr) == (1.0, SUBJECTS.get(name, 1), None)


def test_suites_have_the_papers_benchmarks_and_shots() -> None:
    assert len(SUITES["paper"]) == 11
    assert {name for name, shots in SUITES["paper"].items() if shots} == {"mbpp"}
    assert set(SUITES["paper-5shot"].values()) == {5}
    assert not any(BENCHMARKS[name].runs_code for name in SUITES["quick"])
