"""Preflight finds faults of one rank and a rank that does not answer, and estimates the memory of real engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.ranks import run_ranks
from tools.bench.small_run import ROOT, write_config

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
# fault on rank 1 -> (name of the row that finds it, its status, parts of its message)
FAULTS = {
    "none": ("", "pass", ()),
    "versions": ("versions", "fail", ("torch is 2.0.1, on rank 0", "rank 1 on", "the same environment")),
    "clock": ("clocks", "fail", ("100 s ahead of rank 0", "rank 1 on", "chrony")),
    "slightly off": ("clocks", "warn", ("5 s behind rank 0", "rank 1 on", "chrony")),
    "configuration": ("same configuration", "fail", ("seed: 7, on rank 0 seed: 0", "the same file")),
    "error": ("shards", "fail", ("rank 1 on", "ZeroDivisionError")),
    "lone": ("output directory", "fail", ("output_dir", "it is not shared", "all nodes share")),
}


def test_faults_of_one_rank(workspace: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a file system that one rank has alone needs root")
    config = write_config(workspace, tmp_path)
    (tmp_path / "runs").mkdir()
    found = run_ranks("tests.dist.preflight_worker:planted", 2, config_path=str(config), faults=list(FAULTS))
    for fault, (name, status, parts) in FAULTS.items():
        bad = [row for row in found[fault] if row["status"] != "pass"]
        assert [row["name"] for row in bad] == [name] * bool(name), (fault, bad)
        for row in bad:
            assert row["status"] == status, (fault, row)
            assert all(part in f"{row['found']} {row['fix']}" for part in parts), (fault, row)
    names = [row["name"] for row in found["collectives"]]
    assert "collective reduce_scatter_tensor" in names and "collective all_gather_into_tensor" in names
    assert all("GB/s" in row["found"] or " ms" in row["found"] for row in found["collectives"])
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("worker", "said"),
    [
        ("silent", "barrier of 65,536 bytes: fail: no answer within 3 s: rank 1 of 2 never came to it"),
        pytest.param(
            *(
                "slow_row",
                "versions, devices and clocks: fail: no answer within 3 s: every rank came to it; a disk is ",
            ),
            marks=pytest.mark.long("a second wait for the same limit"),
        ),
    ],
)
def test_a_rank_that_does_not_answer(workspace: Path, tmp_path: Path, worker: str, said: str) -> None:
    """Time may mend it: a job of `ddk submit` requeues itself after this code (tests/slurm)."""
    config = write_config(workspace, tmp_path)
    with pytest.raises(AssertionError) as failure:
        run_ranks(f"tests.dist.preflight_worker:{worker}", 2, config_path=str(config), limit_s=3.0)
    text = str(failure.value)
    assert text.count(said) == 1, text
    assert "a rank failed; exit codes [69, 69]" in text, text  # and not: not done after so many seconds


@pytest.mark.parametrize(
    "precision", ["bf16", pytest.param("fp32", marks=pytest.mark.long("bf16 is the default and has the same code"))]
)
def test_memory_estimate(workspace: Path, tmp_path: Path, precision: str) -> None:
    zero = {"reduce_bucket_size": 100_000, "stage3_param_persistence_threshold": 600}
    config = write_config(workspace, tmp_path, train={"precision": precision}, deepspeed={"zero_optimization": zero})
    result = run_ranks("tests.dist.preflight_worker:measured_memory", 2, config_path=str(config))
    measured, estimated = result["measured"], result["estimated"]
    assert all(value > 0 for value in measured.values()), measured
    for part, value in measured.items():
        assert abs(estimated[part] - value) <= 0.1 * value, (part, estimated[part], value)


@pytest.mark.long("two starts of the launcher; the checks run on ranks above")
def test_through_the_launcher(workspace: Path, tmp_path: Path) -> None:
    config, rows = write_config(workspace, tmp_path), tmp_path / "rows.json"
    port = str(20000 + os.getpid() % 20000)
    command = [DEEPSPEED, "--num_gpus", "2", "--master_port", port, "launch/preflight.py", "--config", str(config)]
    done = subprocess.run([*command, "--json", str(rows)], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert {row["status"] for row in json.loads(rows.read_text())} == {"pass"}
    assert "2 on 1 node" in done.stdout
    done = subprocess.run(
        [*command, "train.micro_batch_samples=3"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode != 0 and "1 failed" in done.stdout, done.stdout[-4000:]
