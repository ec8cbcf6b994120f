"""A run continues with another number of ranks: same samples, same order, and the same losses up to rounding.

Each rank reads only its own elements of the checkpoint; they equal those of DeepSpeed's own universal form.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddk_ds.engine.zero_shards import ZeroShards
from ddk_ds.errors import CheckpointError
from ddk_ds.train.checkpoint.checkpoint_files import read_manifest
from tests.dist.ranks import run_ranks
from tests.dist.resume_worker import run_dir
from tests.dist.tiny import save_model
from tools.bench.small_run import without_clock, write_config

WORKER = "tests.dist.resume_worker:"
# Two groups of parameters with different weight decay; the run is cut within an interval. With AdamW's usual epsilon
# the rounding noise of gradients near zero would move a weight by the learning rate.
OPTIONS: dict[str, Any] = {
    "mixture": {"interval_steps": 4},
    "stop": {"steps": 9},
    "checkpoint": {"every_steps": 3},
    "optimizer": {"weight_decay": 0.3, "eps": 1e-5},
    "train": {"global_batch_samples": 12, "micro_batch_samples": 1},
}

ROUNDED = {"loss", "ce", "kl", "grad_norm", "student_ppl", "ratio", "proportions", "log_proportions", "owed"}


@pytest.fixture(scope="module")
def whole(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a finished run on two ranks that was never interrupted."""
    folder = tmp_path_factory.mktemp("resizing")
    shutil.copytree(workspace / "tokenizer", folder / "student")
    shape = {"hidden": 160, "initializer_range": 0.02}  # so large that the files' directories are small beside it
    save_model(folder / "student", vocab=600, tied=True, seed=1, **shape)
    config = write_config(workspace, folder, **OPTIONS, student={"path": str(folder / "student")})
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
                atol = 1e-4 if key == "owed" else 0.0  # samples: a small difference of larger numbers
                np.testing.assert_allclose(numbers, wanted, rtol=1e-5, atol=atol, err_msg=f"{key} of {line}")
            else:
                assert value == expected[key], key


def test_four_ranks_then_two_then_three(whole: Path) -> None:
    directory = run_dir(str(whole), "cut")
    start: dict[str, Any] = {"timeout_s": 300, "config_path": str(whole), "name": "cut"}
    run_ranks(f"{WORKER}break_off", 4, **start, lines=6)
    assert_little_read(directory, 3, run_ranks(f"{WORKER}go_on_counting", 2, **start, lines=4))
    assert_little_read(directory, 6, run_ranks(f"{WORKER}go_on_counting", 3, **start))
    assert_near(directory, run_dir(str(whole), "whole"))


def assert_little_read(directory: Path, step: int, counted: dict[str, list[int]]) -> None:
    """Check the bytes that all ranks together have read."""
    manifest = read_manifest(directory / f"checkpoints/step-{step:08d}")
    assert manifest is not None
    size = manifest.num_bytes
    for what in ("verified", "loaded"):
        total = sum(counted[what])
        assert 0.9 * size < total < 1.1 * size, (what, total / size, counted)


def test_equal_to_deepspeeds_own(whole: Path, tmp_path: Path) -> None:
    source = max((run_dir(str(whole), "whole") / "checkpoints").glob("step-*")) / "state"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1"]
    command += ["--num_merge_workers", "1", "--input_folder", str(source), "--output_folder", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    shards = ZeroShards(source, 2)
    first, second = shards.model_states["param_shapes"]
    # The number of a rank's groups depends on their size, and so on the number of ranks.
    groups = [dict(list(first.items())[:3]), dict(list(first.items())[3:]), second]
    names = {path.parent.relative_to(tmp_path / "zero").as_posix() for path in (tmp_path / "zero").rglob("fp32.pt")}
    assert set(shards.shapes) == names and len(names) > 10
    for ranks in (1, 3, 5, 600):  # 600: some ranks hold padding alone of a bias
        for rank in {0, 1 % ranks, ranks // 2, ranks - 1}:
            ours = shards.resized(groups, [0, 0, 1], rank, ranks)
            options = ours["optimizer_state_dict"]["param_groups"]
            assert [(group["params"], group["weight_decay"]) for group in options] == [([0, 1], 0.3), ([2], 0.0)]
            for number, shapes in enumerate(groups):
                flat = {"fp32": ours["fp32_flat_groups"][number], **ours["optimizer_state_dict"]["state"][number]}
                assert flat.pop("step") == 9
                for key, tensor in flat.items():
                    theirs = [universal_slice(tmp_path / "zero" / name / f"{key}.pt", rank, ranks) for name in shapes]
                    assert torch.equal(tensor, torch.cat(theirs)), (key, rank, ranks)


def universal_slice(path: Path, rank: int, ranks: int) -> torch.Tensor:
    """The slice of a tensor in DeepSpeed's universal form that a rank holds, with zeros after its end."""
    read = torch.load(path, weights_only=False)
    flat = (read["param"] if isinstance(read, dict) else read).flatten()
    length = math.ceil(len(flat) / ranks)
    return torch.nn.functional.pad(flat, (0, ranks * length - len(flat)))[rank * length : (rank + 1) * length]


def test_a_shard_that_is_cut_short(whole: Path, tmp_path: Path) -> None:
    source = max((run_dir(str(whole), "whole") / "checkpoints").glob("step-*")) / "state"
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shards = ZeroShards(tmp_path, 2)
    shapes = shards.model_states["param_shapes"][0]
    assert torch.equal(shards.read(next(iter(shapes))), ZeroShards(source, 2).read(next(iter(shapes))))
    with (tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").open("r+b") as stream:
        stream.truncate(5000)
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_0_mp_rank_00_optim_states\.pt is cut short"):
        shards.read(next(reversed(shapes)))
