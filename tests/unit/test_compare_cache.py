"""A comparison on a cache of the teacher: who can read it, and what the teacher cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ddk_ds.commands import compare_command as command
from ddk_ds.comparison.comparison_jobs import ComparisonPlan
from ddk_ds.comparison.method_stages import Job
from ddk_ds.comparison.results_table import compare_runs
from ddk_ds.config import load_config, to_yaml
from ddk_ds.data.teacher_cache import TeacherCache, make_cache
from ddk_ds.data.teacher_place import PARTS, LocalPlace
from ddk_ds.data.teacher_samples import Drawn
from ddk_ds.errors import ConfigError
from tests.unit.test_compare import CONFIG, summary

ABLATIONS = sorted(Path("configs/ablations").glob("*.yaml"))
ON_THE_TEACHER = {"temperature": {"0.1", "0.2", "0.5", "2"}}
"""Variants of configs/ablations that cannot read the cache of their configuration, whose temperature is 1."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    teacher = {"path": "big", "cache": {"path": "cache", "draws": 4}}
    path.write_text(yaml.safe_dump({**CONFIG, "teacher": teacher, "stop": {"steps": 4000}}))
    return path


def jobs_of(config: Path, *overrides: str, **values: Any) -> list[Job]:
    return ComparisonPlan(config, overrides, config.parent / "out", **{"seeds": 1, **values}).make_jobs()


def cache_of(job: Job, place: int = -1) -> str | None:
    """The cache of a stage's run as its configuration is loaded; the last stage's unless `place` says another."""
    teacher = load_config(job.config, job.arguments(job.stages[place])).teacher
    return None if teacher is None or teacher.cache is None else teacher.cache.path


@pytest.mark.parametrize("grid", ABLATIONS, ids=lambda path: path.stem)
def test_ablations_run_on_one_cache_where_their_loss_allows_it(config: Path, grid: Path) -> None:
    live = set()
    for job in jobs_of(config, grid=grid):
        found, label = cache_of(job), job.name.removesuffix("-s0")
        if found is None:
            live.add(label)
            assert job.off_cache(job.stages[-1]) == f"loss.temperature: {float(label)}, not 1.0"
        else:
            assert found == str(config.parent / "cache") and job.off_cache(job.stages[-1]) == ""
    assert live == ON_THE_TEACHER.get(grid.stem, set())
    assert len(ABLATIONS) == 5


@pytest.mark.parametrize(
    ("method", "stage", "cached", "reason"),
    [
        ("cpt", -1, False, ""),
        ("kd", -1, True, ""),
        ("ddk", -1, True, ""),
        ("ddk_no_smoothing", -1, True, ""),
        ("ddk_equal", -1, True, ""),
        ("minillm", -1, False, "loss.divergence: reverse_kl"),
        ("ted", 0, False, "method: ted_filters, which needs the teacher itself"),
        ("doremi", 0, False, ""),  # its reference model has no teacher
    ],
)
def test_methods_on_a_cache(config: Path, method: str, stage: int, cached: bool, reason: str) -> None:
    """Also with a cache that the command line names."""
    (job,) = jobs_of(config, methods=(method,))
    assert (cache_of(job, stage) is not None) is cached and job.off_cache(job.stages[stage]) == reason
    without = config.with_name("without.yaml")
    without.write_text(yaml.safe_dump({**CONFIG, "teacher": {"path": "big"}}))
    (job,) = jobs_of(without, "teacher.cache.path=elsewhere", methods=(method,))
    assert (cache_of(job, stage) is not None) is cached


def test_later_stages_learn_from_the_teacher_too(config: Path) -> None:
    (ted,) = jobs_of(config, methods=("ted",))
    assert cache_of(ted) is None and "method: ted, which" in ted.off_cache(ted.stages[-1])
    (doremi,) = jobs_of(config, methods=("doremi",))
    assert cache_of(doremi, 1) is None and "method: doremi_proxy, which" in doremi.off_cache(doremi.stages[1])


def test_a_teacher_that_may_not_be_loaded_is_an_error_before_anything_runs(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(config), "--out", str(config.parent / "out"), "teacher.cache.mode=read_only"]
    assert command.main([*arguments, "--methods", "kd,minillm"]) == 2
    assert "minillm-s0 cannot be read from the teacher's cache (loss.divergence: reverse_kl)" in capsys.readouterr().err
    assert command.main([*arguments, "--grid", "configs/ablations/temperature.yaml"]) == 2
    assert "0.1-s0 cannot be read from the teacher's cache (loss.temperature: 0.1, not 1.0)" in capsys.readouterr().err
    assert not (config.parent / "out").exists()


def test_a_variant_can_have_a_cache_of_its_own(config: Path) -> None:
    grid = config.with_name("grid.yaml")
    variants = {
        "warm": ["loss.temperature=2.0", "teacher.cache.path=warm-cache"],
        "more": ["teacher.cache.draws=8"],
        "other": ["teacher.path=other"],
        "same": ["teacher.cache.draws=4", "loss.temperature=1.0"],
    }
    grid.write_text(yaml.safe_dump({"variants": variants}))
    found = {job.name: (cache_of(job), job.off_cache(job.stages[0])) for job in jobs_of(config, grid=grid)}
    root = config.parent
    assert found["warm-s0"] == (str(root / "warm-cache"), "")
    assert found["more-s0"] == (None, "teacher.cache.draws: 8, not 4")
    assert found["other-s0"] == (None, "teacher.path: other, not big")
    assert found["same-s0"] == (str(root / "cache"), "")


def test_a_cache_that_moved_is_no_other_configuration(config: Path) -> None:
    (job,) = jobs_of(config, methods=("kd",))
    write_run(job.run_dir(""), job, [])
    moved = ("teacher.cache.path=elsewhere", "teacher.cache.mode=read_only")
    (again,) = jobs_of(config, *moved, methods=("kd",))
    assert again.is_done(again.stages[0])
    with pytest.raises(ConfigError, match=r"teacher\.cache\.draws was 4, is 8"):
        jobs_of(config, "teacher.cache.draws=8", methods=("kd",))


def write_run(directory: Path, job: Job, taught: list[int | None]) -> None:
    """A finished run of four-sample steps, of which so many went through the teacher; None: the clock does not say."""
    directory.mkdir(parents=True)
    resolved = load_config(job.config, job.arguments(job.stages[-1]))
    (directory / "config.yaml").write_text(to_yaml(resolved))
    content = summary(None if resolved.teacher is None else [4.0, 10.0], [8.0, 40.0], [5.0, 20.0])
    (directory / "summary.json").write_text(json.dumps(content | {"steps": len(taught)}))
    numbers = dict.fromkeys(("loss", "ce", "kl", "grad_norm", "learning_rate"), 1.0)
    lines: list[dict[str, Any]] = []
    for number, count in enumerate(taught):
        clock: dict[str, float] = {"step_s": 3.0, "teacher_s": 0.5, "teacher_gather_s": 0.25}
        if count is not None:
            clock["teacher_samples"] = count
        line = {"kind": "step", "step": number + 1, "interval": 0, **numbers, "domain_tokens": [], "clock": clock}
        lines.append(line)
    none = dict.fromkeys(("teacher_ppl", "ratio", "smoothed_ppl", "proportions", "asked", "counts"))
    measured = {**none, "student_ppl": {}, "domain_tokens": {}, "alarms": [], "clock": {}}
    lines.append({"kind": "end", "interval": 0, "step": len(taught), **measured})
    (directory / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {"event": "start", "time_s": 1.0, "world_size": 2, "versions": {"torch": "2.9"}}
    events = [start, {"event": "end", "time_s": 2.0}]
    (directory / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_the_cost_of_the_teacher(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of 4 samples a run: kd pays the 12 of the first seed and 8 of the second's, ddk 3 and 0."""
    out = config.parent / "out"
    taught = {"kd": [[4, 4, 4], [4, 4, 0]], "ddk": [[1, 2, 0], [0, 0, 0]], "minillm": [[None] * 3] * 2}
    taught["cpt"] = [[None] * 3] * 2
    for job in jobs_of(config, methods=tuple(taught), seeds=2):
        label, _, seed = job.name.rpartition("-s")
        write_run(out / job.name, job, taught[label][int(seed)])
    monkeypatch.setattr("ddk_ds.comparison.results_table.model_directory", lambda path, key, comm: Path(path))
    monkeypatch.setattr(
        "ddk_ds.comparison.results_table.forward_flops", lambda path, length: 100.0 if path.name == "big" else 10.0
    )
    conditions = {"keep": "sampled", "draws": 4, "vocab_size": 100}
    make_cache(LocalPlace(config.parent / "cache"), conditions)
    cache = TeacherCache(LocalPlace(config.parent / "cache"), conditions, {"a": "1", "b": "2"}, 100)
    for number in range(5):
        cache.add("ab"[number % 2], number, Drawn(np.zeros((8, 4), np.int64), *np.zeros((2, 8), np.float32)))
    cache.publish()

    found = compare_runs(out, "kd", list(taught))
    costs = found["teacher_cost"]
    assert "cpt" not in costs["methods"]
    sample = 8 * 100.0  # tokens of a sample, and the teacher's FLOPs of one
    kd, ddk, minillm = (costs["methods"][label] for label in ("kd", "ddk", "minillm"))
    assert (kd["cached"], kd["asked"], kd["taught"], kd["flops"]) == (2, 24, 20, 20 * sample)
    assert (ddk["asked"], ddk["taught"], ddk["flops_without"]) == (24, 3, 24 * sample)
    assert (minillm["cached"], minillm["taught"], minillm["flops"]) == (0, 24, 24 * sample)
    assert ddk["seconds"] == 2 * 3 * 0.75
    assert costs["on_caches"]["flops"] == 23 * sample and costs["on_caches"]["flops_without"] == 48 * sample
    (weight,) = costs["caches"]
    shards = [*(config.parent / "cache" / PARTS).glob("*/*.mds")]
    assert weight["samples"] == {"a": 3, "b": 2} and weight["bytes"] == sum(path.stat().st_size for path in shards) > 0
    # Of the runs' FLOPs only those are the teacher's that were paid: 3 student forwards a token, and the measurements.
    evaluation = 10 * 80 + 100 * 80
    assert found["methods"]["ddk"]["flops"] == 30 * 96 + 3 * sample / 2 + evaluation
    assert found["methods"]["minillm"]["flops"] == 130 * 96 + evaluation
    assert found["remarks"] == [
        "minillm learnt from the teacher itself, other runs from a cache: loss.divergence: reverse_kl"
    ]

    assert command.main(["--report-only", "--out", str(out), "--methods", ",".join(taught)]) == 0
    text = (out / "comparison.md").read_text()
    assert "| ddk | 2 of 2 | 24 | 3 | 2.400e+03 | 1.920e+04 | 4.5 |" in text
    assert "| all on the cache | 4 of 4 | 48 | 23 |" in text and "paid 47.9% of the teacher" in text
    assert "5 samples" in text


def test_without_a_cache_there_is_no_table_of_it(config: Path) -> None:
    out = config.parent / "out"
    (job,) = jobs_of(config, "teacher.cache=null", methods=("kd",))
    write_run(out / job.name, job, [None, None])
    assert compare_runs(out, None)["teacher_cost"] is None
    # A ledger that does not count what went through the teacher gives no number.
    (job,) = jobs_of(config, methods=("ddk",))
    write_run(out / job.name, job, [4, None])
    assert compare_runs(out, None)["teacher_cost"]["methods"]["ddk"]["taught"] is None
