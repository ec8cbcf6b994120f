"""Methods with two seeds each, on one cache of their teacher, without a launcher: test_readme_commands.py has that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.commands import compare_command
from ddk_ds.config import load_config, to_yaml
from tools.bench.forked import ForkedJob
from tools.bench.small_run import write_config

METHODS = ("cpt", "kd", "ddk")


def forked(config: Path, overrides: Sequence[str], ranks: int, log: Path) -> int | None:
    """In place of `launch`: forked ranks, which have imported all before."""
    whole = load_config(config, overrides)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.with_suffix(".yaml").write_text(to_yaml(whole))
    job = ForkedJob(log.with_suffix(".yaml"), whole.run_dir, ranks)
    code = job.run()
    log.write_text(job.output())
    return code


@pytest.mark.long("six runs; its parts have unit tests")
def test_compare(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddk_ds.comparison.method_stages.launch", forked)
    teacher = {"path": str(workspace / "teacher"), "cache": {"path": str(tmp_path / "cache"), "draws": 16}}
    config = write_config(workspace, tmp_path, stop={"steps": 4}, teacher=teacher)
    out = tmp_path / "compared"
    arguments = ["--config", str(config), "--out", str(out), "--ranks", "1"]
    arguments += ["--methods", ",".join(METHODS), "--seeds", "2"]
    assert compare_command.main(arguments) == 0, capsys.readouterr()
    assert capsys.readouterr().out.count("finished in") == 6

    comparison = json.loads((out / "comparison.json").read_text())
    for label in METHODS:
        summaries = [json.loads((out / f"{label}-s{seed}/summary.json").read_text()) for seed in (0, 1)]
        for number, name in enumerate(comparison["domains"]):
            after = [summary["domains"][number]["student_ppl_after"] for summary in summaries]
            found = comparison["methods"][label]["ppl"][name]
            assert found["values"] == after
            assert found["mean"] == pytest.approx(sum(after) / 2)
        assert comparison["methods"][label]["tokens"] == 4 * 8 * 63
    # One start, one teacher, which cpt has from the other runs; other seeds see other samples.
    assert comparison["remarks"] == []
    assert comparison["teacher_ppl"].keys() == {"python", "cpp", "mathematics"}
    values = comparison["methods"]["ddk"]["score"]["values"]
    assert values[0] != values[1]
    flops = {label: comparison["methods"][label]["flops"] for label in METHODS}
    assert flops["kd"] > flops["ddk"] > flops["cpt"] > 0
    assert_nothing_is_taught_twice(comparison, out)
    assert comparison["differences"]["ddk"]["score"]["seeds"] == 2
    assert (out / "comparison.png").is_file() and "± " in (out / "comparison.md").read_text()

    assert compare_command.main(arguments) == 0
    assert capsys.readouterr().out.count("finished before, skipped") == 6
    assert compare_command.main([*arguments, "loss.gamma=0.3"]) == 2
    assert "loss.gamma was 0.2, is 0.3" in capsys.readouterr().err


def assert_nothing_is_taught_twice(comparison: dict[str, Any], out: Path) -> None:
    """With one seed all methods have the same first samples of a domain: the second pays where it draws more."""
    drawn, taught = {}, {}
    for label in METHODS[1:]:
        lines = [json.loads(line) for line in (out / f"{label}-s0/ledger.jsonl").read_text().splitlines()]
        (drawn[label],) = [line["counts"] for line in lines if line["kind"] == "interval"]
        taught[label] = sum(line["clock"]["teacher_samples"] for line in lines if line["kind"] == "step")
    assert taught["kd"] == sum(drawn["kd"].values()) == 4 * 8
    more = sum(max(0, drawn["ddk"][name] - drawn["kd"][name]) for name in drawn["kd"])
    assert 0 < taught["ddk"] == more + more % 2 < 4 * 8, "in full micro-batches of two, but for the last one"
    cost = comparison["teacher_cost"]
    assert cost["on_caches"]["asked"] == 128
    cached = sum(cost["caches"][0]["samples"].values())
    assert cached <= cost["on_caches"]["taught"] <= cached + 3, "each of three runs has a last one"
    assert cost["methods"]["kd"]["seconds"] > 0
