"""Methods with two seeds each through the real launcher, on one cache of their teacher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.bench.small_run import ROOT, write_config

METHODS = ("cpt", "kd", "ddk")


def run_compare(config: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command, on one rank."""
    command = [sys.executable, "tools/compare.py", "--config", str(config), "--out", str(out), "--ranks", "1", *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.mark.long("nine starts; its parts have unit tests")
def test_compare(workspace: Path, tmp_path: Path) -> None:
    teacher = {"path": str(workspace / "teacher"), "cache": {"path": str(tmp_path / "cache"), "draws": 16}}
    config = write_config(workspace, tmp_path, stop={"steps": 4}, teacher=teacher)
    out = tmp_path / "compared"
    arguments = ("--methods", ",".join(METHODS), "--seeds", "2")
    done = run_compare(config, out, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished in") == 6

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

    again = run_compare(config, out, *arguments)
    assert again.returncode == 0 and again.stdout.count("finished before, skipped") == 6
    other = run_compare(config, out, *arguments, "loss.gamma=0.3")
    assert other.returncode == 2 and "loss.gamma was 0.2, is 0.3" in other.stderr


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
