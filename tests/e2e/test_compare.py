"""Two methods with two seeds each through the real launcher, then a third after the fact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.small_run import ROOT, write_config

METHODS = ("cpt", "ddk")


def run_compare(config: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command, on one rank."""
    command = [sys.executable, "tools/compare.py", "--config", str(config), "--out", str(out), "--ranks", "1", *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.mark.long("seven starts; its parts have unit tests")
def test_compare(workspace: Path, tmp_path: Path) -> None:
    config, out = write_config(workspace, tmp_path, stop={"steps": 4}), tmp_path / "compared"
    arguments = ("--methods", ",".join(METHODS), "--seeds", "2")
    done = run_compare(config, out, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished in") == 4

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
    assert flops["ddk"] > flops["cpt"] > 0
    assert comparison["differences"]["ddk"]["score"]["seeds"] == 2
    assert (out / "comparison.png").is_file() and "± " in (out / "comparison.md").read_text()

    again = run_compare(config, out, *arguments)
    assert again.returncode == 0 and again.stdout.count("finished before, skipped") == 4
    other = run_compare(config, out, *arguments, "loss.gamma=0.3")
    assert other.returncode == 2 and "loss.gamma was 0.2, is 0.3" in other.stderr
