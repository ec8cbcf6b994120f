"""A teacher for each domain by the commands that a user starts: `ddk teach`, and a run that only reads the cache."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from torch.nn.functional import cross_entropy

from ddk_ds.data.manifest import load_manifest
from tests.dist.teacher_cache_worker import all_samples
from tests.dist.test_teacher_cache_content import plain_logits, sharper
from tests.e2e.test_run import forked
from tools.bench.small_run import run_tool, without_clock, write_config


@pytest.mark.long("a start of the launcher and a run; tests/dist/test_teacher_cache_content.py has the loss")
def test_each_domains_perplexity_is_its_own_teachers(workspace: Path, tmp_path: Path) -> None:
    """By plain transformers: the samples in the cache by `ddk teach`, held-out ones by the ledger."""
    teachers = {name: workspace / "teacher" for name in load_manifest(workspace / "shards").domains}
    teachers["cpp"] = sharper(workspace / "teacher", tmp_path / "cpp")
    section = {
        "path": str(workspace / "teacher"),
        "cache": {"path": str(tmp_path / "cache"), "mode": "read_only", "draws": 16},
        "by_domain": {"cpp": str(teachers["cpp"])},
    }
    config = write_config(workspace, tmp_path, name="reading", teacher=section, stop={"steps": 3})
    options = ("teach", "--ranks", "2", "--config", str(config), "--samples", "24")
    filled = run_tool("-c", "import sys; from ddk_ds.commands.console import main; sys.exit(main())", *options).stdout
    told = dict(item for line in filled.splitlines() if "at temperature 1: " in line for item in perplexities(line))
    forked(config)
    intervals = [line for line in without_clock(tmp_path / "runs/reading") if line["kind"] == "interval"]
    cached = all_samples(tmp_path / "cache")
    assert len(cached) == 3 * 24
    for name, teacher in teachers.items():
        taught = mean_loss(teacher, workspace, [key for key in cached if key[0] == name], "train")
        assert told[name] == f"{np.exp(taught):.4g}"
        held_out = mean_loss(teacher, workspace, [(name, number) for number in range(12)], "validation")
        assert intervals[0]["teacher_ppl"][name] == pytest.approx(np.exp(held_out), rel=1e-5), name
    by_one = mean_loss(workspace / "teacher", workspace, [("cpp", number) for number in range(12)], "validation")
    assert intervals[0]["teacher_ppl"]["cpp"] > 1.5 * np.exp(by_one), "the other teacher would be noticed"


def perplexities(line: str) -> list[tuple[str, str]]:
    """Return names and perplexities from what `ddk teach` says at its end."""
    found = re.findall(r"(\w+) ([\d.e+]+)(?:,|$)", line.partition("at temperature 1: ")[2].strip())
    return [(name, value) for name, value in found]


def mean_loss(teacher: Path, workspace: Path, places: list[tuple[str, int]], split: str) -> float:
    logits = plain_logits(teacher, workspace, places, split)
    return float(np.mean([cross_entropy(of_sample[:-1], ids[1:]).item() for of_sample, ids in logits.values()]))
