"""A run continues with another number of ranks: same samples, same order, and the same losses up to rounding.

It continues from DeepSpeed's universal checkpoint, which all ranks make here; it equals the one that DeepSpeed makes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.dist.ranks import run_ranks
from tests.dist.resume_worker import run_dir
from tools.bench.small_run import without_clock, write_config

WORKER = "tests.dist.resume_worker:"
# Two groups of parameters with different weight decay; the run is cut within an interval. With AdamW's usual epsilon
# the rounding noise of gradients near zero would move a weight by the learning rate.
OPTIONS: dict[str, Any] = {
    "mixture": {"interval_steps": 4},
    "stop": {"steps": 9},
    "checkpoint": {"every_steps": 3},
    "optimizer": {"weight_decay": 0.3, "eps": 1e-5},
    "train": {"micro_batch_samples": 1},
}


ROUNDED = {"loss", "ce", "kl", "grad_norm", "student_ppl", "ratio", "proportions", "log_proportions", "owed"}


@pytest.fixture(scope="module")
def whole(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a finished run on two ranks that was never interrupted."""
    config = write_config(workspace, tmp_path_factory.mktemp("universal"), **OPTIONS)
    run_ranks(f"{WORKER}go_on", 2, timeout_s=300, config_path=str(config), name="whole")
    return config


def assert_near(directory: Path, reference: Path) -> None:
    """Check that two ledgers are equal: floating-point numbers to 1e-5, everything else exactly."""
    ours, theirs = without_clock(directory), without_clock(reference)
    assert len(ours) == len(theirs)
    for line, expected in zip(ours, theirs, strict=True):
        assert line.keys() == expected.keys()
        for key, value in line.items():
            numbers = list(value.values()) if isinstance(value, dict) else value
            wanted = list(expected[key].values()) if isinstance(value, dict) else expected[key]
            if key in ROUNDED and wanted is not None:
                atol = 1e-5 if key == "owed" else 0.0  # samples; it can be 0
                np.testing.assert_allclose(numbers, wanted, rtol=1e-5, atol=atol, err_msg=f"{key} of {line}")
            else:
                assert value == expected[key], key


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.long("two to one rank has the same code"))])
def test_two_ranks_then_others(whole: Path, ranks: int) -> None:
    name = f"cut-{ranks}"
    run_ranks(f"{WORKER}break_off", 2, timeout_s=300, config_path=str(whole), name=name, lines=7)
    run_ranks(f"{WORKER}go_on", ranks, timeout_s=300, config_path=str(whole), name=name)
    directory = run_dir(str(whole), name)
    assert_near(directory, run_dir(str(whole), "whole"))
    # The universal checkpoint is removed once a newer checkpoint is complete.
    assert not list((directory / "checkpoints").glob("universal-*"))


def test_equal_to_deepspeeds_own(whole: Path, tmp_path: Path) -> None:
    from ddk_ds.engine.zero_shards import write_universal

    source = max((run_dir(str(whole), "whole") / "checkpoints").glob("step-*")) / "state"
    for rank in range(3):
        files, failure = write_universal(source, tmp_path / "ours", source_ranks=2, rank=rank, world_size=3)
        assert files and not failure
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1"]
    command += ["--num_merge_workers", "1", "--input_folder", str(source), "--output_folder", str(tmp_path / "theirs")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    theirs = sorted(path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs/zero").rglob("*.pt"))
    assert len(theirs) > 30
    for name in theirs:
        ours = torch.load(tmp_path / "ours" / name, weights_only=True)
        expected = torch.load(tmp_path / "theirs" / name, weights_only=False)
        if name.name != "optimizer_state.pt":
            assert torch.equal(ours, expected), name
    assert (tmp_path / "ours/zero/optimizer_state.pt").stat().st_size < 20_000
