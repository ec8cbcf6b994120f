"""Comparing methods: jobs, stages, and the report on made-up runs."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from ddk_ds.comm import SingleProcess
from ddk_ds.command_line import RANK_SCRIPT
from ddk_ds.commands import compare_command as command
from ddk_ds.commands import stages_command
from ddk_ds.comparison import method_stages as stages
from ddk_ds.comparison.comparison_jobs import SUITES, ComparisonPlan, read_grid
from ddk_ds.comparison.comparison_report import draw, markdown
from ddk_ds.comparison.method_stages import STAGES, Job, run_job
from ddk_ds.comparison.results_table import Result, RunCost, compare, read_results, run_cost
from ddk_ds.config import load_config, to_yaml
from ddk_ds.data.mds import read_index
from ddk_ds.data.store import LocalStore
from ddk_ds.errors import ConfigError, DataError
from ddk_ds.remote_hosts import decoded
from ddk_ds.train.inputs import check_inputs
from ddk_ds.train.run_dir import run_identity
from tools.bench.small_run import write_config

CONFIG = {
    "name": "base",
    "student": {"path": "start"},
    "teacher": {"path": "big"},
    "data": {"path": "shards", "sequence_length": 8, "validation_samples": 5},
    "optimizer": {"warmup_steps": 0},
    "train": {"global_batch_samples": 4},
    "stop": {"steps": 10},
}
CONTROLLERS = (
    *("by_size", "equal", "ddk", "ddk_no_smoothing", "ado", "odm", "kl_gap", "loss_softmax"),
    *("sheared_llama", "doremi_online"),
)
"""Controllers of the suite `mixtures` whose variant is one run."""
COST = RunCost(tokens=100, wall_s=10.0, evaluation_time_share=0.1, flops=1e6, evaluation_flops=1e5)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def plan_of(config: Path, out: Path, *overrides: str, **values: Any) -> ComparisonPlan:
    """A comparison of cpt and kd, with one seed each, unless `values` say otherwise."""
    return ComparisonPlan(config, overrides, out, **{"seeds": 1, "methods": ("cpt", "kd"), **values})


def summary(teacher: list[float] | None, before: list[float], after: list[float], tokens: int = 100) -> dict[str, Any]:
    """A run's summary over the domains a, b, ..."""
    return {
        "run": "run",
        "mean_ratio_before": None,
        "mean_ratio_after": None,
        "reason": "10 steps done",
        "steps": 10,
        "tokens": tokens,
        "wall_s": 10.0,
        "domains": [
            {
                "name": "abcdefghij"[i],
                "teacher_ppl": teacher and teacher[i],
                "student_ppl_before": before[i],
                "student_ppl_after": after[i],
                "ratio_before": None,
                "ratio_after": None,
                "tokens": tokens // len(after),
                "token_share": 1 / len(after),
            }
            for i in range(len(after))
        ],
    }


def result(label: str, seed: int, after: list[float], teacher: list[float] | None = None, **more: Any) -> Result:
    return Result(label, seed, summary(teacher, [8.0, 40.0], after), COST, **more)


def test_a_method_without_teacher_is_held_against_the_others_teacher() -> None:
    teacher = [4.0, 10.0]
    runs = [
        *(result("cpt", seed, [6.0 + seed, 20.0]) for seed in (0, 1)),
        *(result("kd", seed, [5.0 + seed, 20.0], teacher) for seed in (0, 1)),
    ]
    found = compare(runs, "kd")
    assert found["teacher_ppl"] == {"a": 4.0, "b": 10.0}
    assert found["start"] == {"score": (8 / 4 + 40 / 10) / 2, "worst_ratio": 4.0}
    assert found["methods"]["cpt"]["score"]["values"] == ((6 / 4 + 2) / 2, (7 / 4 + 2) / 2)
    assert found["methods"]["kd"]["ppl"]["a"]["mean"] == 5.5
    assert found["differences"]["cpt"]["score"]["mean"] == pytest.approx(0.125)
    assert found["differences"]["cpt"]["ppl"]["a"] == {
        **{"seeds": 2, "mean": 1.0, "standard_error": 0.0, "low": 1.0, "high": 1.0, "p": 0.0, "p_holm": 0.0},
        "verdict": "exceeds the spread",
    }
    assert found["remarks"] == []


def test_the_worst_domain_and_the_loss_by_size() -> None:
    teacher, tokens = [4.0, 10.0], {"a": 300, "b": 100}
    after = ([5.0, 20.0], [5.0, 30.0], [9.0, 20.0])
    found = compare([result("kd", i, ppl, teacher, train_tokens=tokens) for i, ppl in enumerate(after)], "kd")
    kd = found["methods"]["kd"]
    assert kd["worst_ratio"]["values"] == (2.0, 3.0, 2.25) and kd["worst_domains"] == {"b": 2, "a": 1}
    losses = [0.75 * math.log(a) + 0.25 * math.log(b) for a, b in after]
    assert kd["loss"]["values"] == pytest.approx(losses)
    assert found["teacher"] == {"score": 1.0, "worst_ratio": 1.0, "loss": pytest.approx(math.log(4**0.75 * 10**0.25))}
    text = markdown(found | {"ranks": [1], "versions": {}})
    assert "| worst domain's ratio | 1.000 | 4.000 | 2.417 ± 0.520 b (2), a (1) |" in text
    assert "loss by size, nats a token" in text and "## Ranking" not in text


def test_without_any_teacher_the_score_is_the_geometric_mean() -> None:
    found = compare([result("cpt", 0, [4.0, 9.0])], "cpt")
    assert (found["metrics"], found["teacher"]) == ({"score": "geometric mean perplexity"}, None)
    assert found["methods"]["cpt"]["score"]["mean"] == pytest.approx(6.0)


def test_what_is_unfair_or_missing_is_said() -> None:
    other = Result("ddk", 0, summary([4.0, 11.0], [8.1, 40.0], [5.0, 20.0]), RunCost(200, 10.0, 0.1, None, None))
    remarks = compare([*(result("kd", seed, [5.0, 20.0], [4.0, 10.0]) for seed in (0, 1)), other], "cpt")["remarks"]
    assert [remark.split(":")[0] for remark in remarks] == [
        "ddk has 1 of 2 seeds",
        "another starting student or other validation samples",
        "another teacher or other validation samples",
        "the runs trained on 100 to 200 tokens, so not on the same number",
        "no run of the baseline cpt is finished",
    ]
    with pytest.raises(DataError, match="other domains"):
        compare([result("kd", 0, [5.0, 20.0]), Result("ddk", 0, summary(None, [8.0], [5.0]), COST)], "kd")


def write_run(directory: Path, config: Path, after: list[float], *overrides: str) -> Path:
    """Write the directory of a finished run and return it."""
    directory.mkdir(parents=True)
    resolved = load_config(config, [*overrides, f"name={directory.name}", f"output_dir={directory.parent}"])
    (directory / "config.yaml").write_text(to_yaml(resolved))
    (directory / "summary.json").write_text(
        json.dumps(summary(None if resolved.teacher is None else [4.0, 10.0], [8.0, 40.0], after))
    )
    none = dict.fromkeys(("teacher_ppl", "ratio", "smoothed_ppl", "proportions", "asked", "counts"))
    numbers = dict.fromkeys(("loss", "ce", "kl", "grad_norm", "learning_rate"), 1.0)
    measured = {**none, "student_ppl": {}, "domain_tokens": {}, "alarms": [], "clock": {"measure_s": 1.0}}
    step = {"kind": "step", "interval": 0, **numbers, "domain_tokens": [], "clock": {"step_s": 3.0}}
    records = [
        *({**step, "step": number} for number in (1, 2, 3)),
        *({"kind": kind, "interval": 0, "step": 10, **measured} for kind in ("interval", "interval", "end")),
    ]
    (directory / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    start = {"event": "start", "time_s": 1.0, "world_size": 2, "versions": {"torch": "2.9"}}
    events = [start, {"event": "end", "time_s": 2.0}]
    (directory / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return directory


def test_cost_of_a_run(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "out/kd-s0", config, [5.0, 20.0], "method=kd")
    monkeypatch.setattr("ddk_ds.comparison.results_table.model_directory", lambda path, key, comm: Path(path))
    monkeypatch.setattr(
        "ddk_ds.comparison.results_table.forward_flops", lambda path, length: 100.0 if path.name == "big" else 10.0
    )
    cost = run_cost(run)
    assert cost.evaluation_time_share == 3 / 12
    # 3 measurements of the student and 1 of the teacher, of 2 domains x 5 samples x 8 tokens; 10 steps of 4 x 8 tokens.
    assert cost.evaluation_flops == (3 * 10 + 100) * 80
    assert cost.flops == 130 * 320 + cost.evaluation_flops
    monkeypatch.undo()
    assert run_cost(run).flops is None  # the models' files are gone


def test_results_are_found_with_their_stages(tmp_path: Path, config: Path) -> None:
    out = tmp_path / "out"
    for name in ("kd-s0", "kd-s1", "cpt-s0", "doremi-s0", "doremi-s0-proxy", "doremi-s0-reference"):
        write_run(out / name, config, [5.0, 20.0], *STAGES["cpt"][0].overrides)
    (out / "ddk-s0").mkdir()  # not finished
    found = read_results(out)
    assert [(one.label, one.seed) for one in found] == [("cpt", 0), ("doremi", 0), ("kd", 0), ("kd", 1)]
    assert [len(one.earlier) for one in found] == [0, 2, 0, 0]
    assert [(one.label, one.seed) for one in read_results(out, ["kd", "cpt"], range(1))] == [("kd", 0), ("cpt", 0)]
    assert compare(found, "kd")["methods"]["doremi"]["earlier_tokens"] == 200


def test_report_only(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert command.main(["--report-only", "--out", str(out)]) == 2
    for seed in (0, 1):
        write_run(out / f"kd-s{seed}", config, [5.0 + seed, 60.0], "method=kd")
    write_run(out / "ddk-s1", config, [4.5, 50.0], "method=ddk")
    assert command.main(["--report-only", "--out", str(out), "--methods", "kd,ddk"]) == 0
    text = (out / "comparison.md").read_text()
    assert "| domain | teacher | before | kd (2) | ddk (1) |" in text
    assert "| a | 4.00 | 8.00 | 5.50 ± 0.71 | 4.50 |" in text
    assert "one seed: no spread is known" in text and "- ddk has 1 of 2 seeds" in text
    assert json.loads((out / "comparison.json").read_text())["versions"] == {"torch": ["2.9"]}
    assert (out / "comparison.png").read_bytes()[1:4] == b"PNG"
    assert text in capsys.readouterr().out


def test_the_picture_holds_many_variants(tmp_path: Path) -> None:
    runs = [result(f"variant-{i}", 0, [5.0 + i, 2000.0], [4.0, 10.0]) for i in range(11)]
    comparison = compare(runs, "variant-0") | {"ranks": [1], "versions": {}}
    draw(comparison, tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 10_000
    assert "variant-10" in markdown(comparison)


def test_jobs_of_methods(tmp_path: Path, config: Path) -> None:
    jobs = plan_of(config, tmp_path / "out", methods=("cpt", "ddk"), seeds=2).make_jobs()
    assert [job.name for job in jobs] == ["cpt-s0", "ddk-s0", "cpt-s1", "ddk-s1"]
    resolved = [load_config(config, job.arguments(job.stages[0])) for job in jobs]
    assert [one.seed for one in resolved] == [0, 0, 1, 1]
    assert [one.teacher is None for one in resolved] == [True, False, True, False]
    assert [one.mixture.controller for one in resolved] == ["by_size", "ddk", "by_size", "ddk"]
    assert resolved[0].run_dir == tmp_path / "out/cpt-s0"
    assert {one.student.path for one in resolved} == {"start"}


@pytest.mark.parametrize(
    ("values", "extra", "message"),
    [
        ({"mixture": {"controller": "equal"}}, [], r"mixture.controller: .* sets it to 'equal'"),
        ({}, ["loss.divergence=reverse_kl"], r"loss.divergence: .* sets it to 'reverse_kl'"),
        ({}, ["seed=3"], "override seed=3: the comparison sets it"),
        ({"stop": {"discrepancy": 0.1, "steps": 10}}, [], "stop.discrepancy compares with a teacher"),
        ({"stopp": {}}, [], "stopp: unknown key"),
    ],
)
def test_a_configuration_that_cannot_be_compared(
    tmp_path: Path, values: dict[str, Any], extra: list[str], message: str
) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(CONFIG | values))
    with pytest.raises(ConfigError, match=message):
        plan_of(path, tmp_path / "out", *extra).make_jobs()
    assert not (tmp_path / "out").exists()


def test_an_unknown_method_or_baseline(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in ((["--methods", "kd,dkk"], "method 'dkk' is unknown"), (["--baseline", "x"], "--baseline x")):
        assert command.main(["--config", str(config), "--out", str(tmp_path / "out"), *more]) == 2
        assert message in capsys.readouterr().err


def test_a_grids_variants_are_runs(tmp_path: Path) -> None:
    config, grid = tmp_path / "base.yaml", tmp_path / "grid.yaml"
    config.write_text(yaml.safe_dump(CONFIG | {"mixture": {"controller": "equal"}}))
    variants = {"0.1": ["loss.gamma=0.1"], "kd": ["method=kd", "mixture.controller=by_size"]}
    grid.write_text(yaml.safe_dump({"variants": variants}))
    jobs = plan_of(config, tmp_path / "out", grid=grid).make_jobs()
    resolved = [load_config(config, job.arguments(job.stages[0])) for job in jobs]
    assert [(one.name, one.method, one.mixture.controller, one.loss.gamma) for one in resolved] == [
        ("0.1-s0", "ddk", "equal", 0.1),
        ("kd-s0", "kd", "by_size", 0.2),
    ]
    grid.write_text(yaml.safe_dump({"variants": {"kd": ["method=kd"]}}))
    with pytest.raises(ConfigError, match=r"mixture\.controller"):
        plan_of(config, tmp_path / "out", grid=grid).make_jobs()


@pytest.mark.parametrize("setting", ["weak", "near"])
def test_the_suite_of_mixtures_differs_in_the_mixture_alone(tmp_path: Path, setting: str) -> None:
    config = Path(f"configs/experiments/mixtures_{setting}.yaml")
    jobs = plan_of(config, tmp_path / "out", grid=SUITES["mixtures"]).make_jobs()
    runs = {job.name: load_config(config, job.arguments(job.stages[0])) for job in jobs if len(job.stages) == 1}
    assert {name.removesuffix("-s0"): one.mixture.controller for name, one in runs.items()} == {
        name: name for name in CONTROLLERS
    }
    others = [one.model_dump(exclude={"name": True, "mixture": {"controller"}}) for one in runs.values()]
    assert all(one == others[0] for one in others) and others[0]["method"] == "ddk"
    assert [job.method for job in jobs if len(job.stages) > 1] == ["doremi_static"]


def test_a_suite_is_its_grid(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    arguments = ["--config", str(config), "--out", str(tmp_path / "out"), "--seeds", "1", "--suite", "mixtures"]
    assert command.main(arguments) == 0
    assert [name for name in launches.names if name.startswith("d")] == [
        *("ddk-s0", "ddk_no_smoothing-s0", "doremi_online-s0"),
        *("doremi_static-s0-reference", "doremi_static-s0-proxy", "doremi_static-s0"),
    ]
    final = load_config(config, launches.overrides[-1])
    assert (final.method, final.mixture.controller) == ("ddk", "static")
    assert final.teacher is not None and final.teacher.path == "big"
    assert final.mixture.proportions == {"a": 0.25, "b": 1e-05}


@pytest.mark.parametrize(
    "text", ["[1]", "variants: {}", "variants: {a b: [x=1]}", "variants: {a: [x]}", "variants: {a: x=1}"]
)
def test_a_wrong_grid(tmp_path: Path, text: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"--grid {path}"):
        read_grid(path)


class Launches:
    """Stands in for the launcher: leaves a finished run, unless its name is to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: str = "") -> None:
        self.names: list[str] = []
        self.overrides: list[list[str]] = []
        self.failing = failing
        monkeypatch.setattr(stages, "launch", self)

    def __call__(self, config: Path, overrides: list[str], ranks: int | None, log: Path) -> int:
        resolved = load_config(config, overrides)
        self.names.append(resolved.name)
        self.overrides.append(overrides)
        if resolved.name == self.failing:
            return 0  # as the launcher does when a signal ends what it started
        run = write_run(resolved.run_dir, config, [5.0, 20.0], *overrides)
        if resolved.method == "doremi_proxy":
            (run / "export").mkdir()
            (run / "export/proportions.yaml").write_text("{a: 0.25, b: 1.0e-05}\n")
        return 0


def test_a_stage_that_time_may_mend_keeps_its_code(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "launch", lambda *_: 69)
    overrides = [f"output_dir={tmp_path / 'out'}"]
    assert stages_command.main(["--config", str(config), "--method", "doremi", *overrides]) == 69
    assert "failed with exit code 69: see" in capsys.readouterr().err


def test_stages_of_doremi(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    job = Job(config, "doremi", "doremi-s0", tmp_path / "out", ("seed=4",))
    assert len(list(run_job(job, 1))) == 3
    assert launches.names == ["doremi-s0-reference", "doremi-s0-proxy", "doremi-s0"]
    reference, proxy, final = (load_config(config, overrides) for overrides in launches.overrides)
    assert (reference.method, reference.teacher, reference.student.path) == ("cpt", None, "start")
    assert proxy.teacher is not None and proxy.teacher.path == str(tmp_path / "out/doremi-s0-reference/export")
    assert (final.method, final.teacher, final.mixture.controller) == ("cpt", None, "static")
    assert final.mixture.proportions == {"a": 0.25, "b": 1e-05}
    assert {one.seed for one in (reference, proxy, final)} == {4}
    # All are finished now; without its last run only that is started.
    assert all("skipped" in line for line in run_job(job, 1))
    (job.run_dir("") / "summary.json").rename(job.run_dir("") / "gone")
    job.run_dir("").rename(tmp_path / "gone")
    list(run_job(job, 1))
    assert launches.names[3:] == ["doremi-s0"]


def test_stages_of_ted(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    list(run_job(Job(config, "ted", "t", tmp_path / "out"), 1))
    assert launches.names == ["t-filters", "t"]
    final = load_config(config, launches.overrides[1])
    assert final.ted.filters == str(tmp_path / "out/t-filters/export/filters.safetensors")


def test_a_failed_stage_ends_its_method_alone(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--config", str(config), "--out", str(out), "--methods", "ted,kd,ddk", "--seeds", "1"]
    launches = Launches(monkeypatch, failing="ted-s0-filters")
    assert command.main(arguments) == 1
    assert launches.names == ["ted-s0-filters", "kd-s0", "ddk-s0"]
    assert f"see {out / 'ted-s0-filters.log'}" in capsys.readouterr().err
    assert "no run of the baseline ted is finished" in (out / "comparison.md").read_text()
    launches = Launches(monkeypatch, failing="ted-s0-filters")
    assert command.main([*arguments, "--stop-on-error"]) == 1
    assert launches.names == ["ted-s0-filters"]
    assert command.main(arguments) == 1
    launches = Launches(monkeypatch)
    assert command.main(arguments) == 0
    assert launches.names == ["ted-s0-filters", "ted-s0"]
    launches = Launches(monkeypatch, failing="kd-s0")
    alone = ["--config", str(config), "--out", str(tmp_path / "alone"), "--methods", "kd", "--seeds", "1"]
    assert command.main(alone) == 1
    assert "nothing to report" in capsys.readouterr().err


def test_a_finished_run_of_another_configuration_is_an_error(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(config), "--out", str(tmp_path / "out"), "--methods", "kd", "--seeds", "1"]
    launches = Launches(monkeypatch)
    assert command.main(arguments) == 0
    assert command.main([*arguments, "checkpoint.every_steps=7"]) == 0
    assert command.main([*arguments, "loss.gamma=0.3"]) == 2
    assert "loss.gamma was 0.2, is 0.3" in capsys.readouterr().err
    assert launches.names == ["kd-s0"]


def test_a_finished_run_of_other_content_at_the_same_place_is_an_error(workspace: Path, tmp_path: Path) -> None:
    for name in ("student", "shards"):
        shutil.copytree(workspace / name, tmp_path / name)
    config = write_config(
        workspace, tmp_path, student={"path": str(tmp_path / "student")}, data={"path": str(tmp_path / "shards")}
    )
    job = Job(config, "kd", "kd-s0", tmp_path / "out")
    run = write_run(tmp_path / "out/kd-s0", config, [5.0, 20.0], "method=kd")
    finished = load_config(run / "config.yaml")
    identity = run_identity(finished, check_inputs(finished, SingleProcess()).fingerprints)
    (run / "run.json").write_text(json.dumps(identity))
    assert job.is_done(job.stages[0])
    weights, index = tmp_path / "student/model.safetensors", next((tmp_path / "shards").glob("*/train/index.json"))
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"since then student\.path .*student got other content at the same place"):
        job.is_done(job.stages[0])
    weights.write_bytes(kept)
    # As a preparation of other text of the same size would leave it.
    store, split = LocalStore(tmp_path / "shards"), str(index.parent.relative_to(tmp_path / "shards"))
    shards, old = json.loads(index.read_text()), read_index(store, split).sha
    shards["shards"][0]["raw_data"]["hashes"]["xxh64"] = "0" * 16
    index.write_text(json.dumps(shards))
    manifest = tmp_path / "shards/domains.json"
    manifest.write_text(manifest.read_text().replace(old, read_index(store, split).sha))
    with pytest.raises(ConfigError, match=rf"since then data\.path .*shards \({index.parts[-3]}\) got other content"):
        job.is_done(job.stages[0])


def test_an_interrupted_run_ends_the_comparison(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "launch", lambda *_: stages.EXIT_INTERRUPTED)
    arguments = ["--config", str(config), "--out", str(tmp_path / "out"), "--methods", "kd,ddk", "--seeds", "1"]
    assert command.main(arguments) == stages.EXIT_INTERRUPTED
    assert "start the same command again" in capsys.readouterr().err


def test_one_method_as_one_command(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    arguments = ["--config", str(config), "--method", "ted", f"output_dir={tmp_path / 'runs'}"]
    assert stages_command.main(arguments) == 0
    assert launches.names == ["base-filters", "base"]
    monkeypatch.setattr(stages, "launch", lambda *_: 3)
    assert stages_command.main([*arguments, "name=other"]) == 1


def test_the_launcher_is_started_without_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def popen(command: list[str], **options: Any) -> Any:
        assert not options.get("shell")
        started.append(command)
        return SimpleNamespace(wait=lambda: 5, pid=process.pid)

    process = subprocess.Popen([sys.executable, "-c", ""], process_group=0)
    process.wait()  # there is nothing left in its process group to wait for
    monkeypatch.setattr("ddk_ds.launcher.subprocess.Popen", popen)
    log = tmp_path / "out/run.log"
    assert stages.launch(tmp_path / "a b.yaml", ["x={a: 1}"], 2, log) == 5
    at = started[0].index(str(RANK_SCRIPT))
    assert decoded(started[0][at + 1 :]) == ["--config", str(tmp_path / "a b.yaml"), "x={a: 1}"]
    assert "--num_gpus=2" in started[0][:at]
    assert "distill_rank.py" in log.read_text()
