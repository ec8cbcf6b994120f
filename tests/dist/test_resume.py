"""A run that is interrupted at any line of its ledger and resumed has the uninterrupted run's ledger, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.dist.ranks import run_ranks
from tests.dist.resume_worker import run_dir
from tests.quantised_checkpoint import write_fp8
from tools.bench.small_run import without_clock, write_config


def test_interrupted_anywhere(workspace: Path, tmp_path: Path) -> None:
    # 3 intervals of 2 steps, a checkpoint every 2 steps. Broken off before the first checkpoint, at borders and in the
    # middle of intervals, and at the end.
    config = write_config(
        workspace, tmp_path, mixture={"interval_steps": 2}, stop={"steps": 6}, checkpoint={"every_steps": 2}
    )
    uninterrupted = 3 + 6 + 1
    names: dict[str, int | None] = {"whole": None}
    breaks = (2, 4, 9, uninterrupted)
    names |= {f"broken-{lines}": lines for lines in breaks}
    done = run_ranks(
        "tests.dist.resume_worker:break_and_resume", 2, timeout_s=400, config_path=str(config), names=names
    )
    assert done == [f"broken-{lines}" for lines in breaks]
    whole = without_clock(run_dir(str(config), "whole"))
    assert len(whole) == uninterrupted
    for name in done:
        assert without_clock(run_dir(str(config), name)) == whole, name


def test_a_teacher_that_is_computed_otherwise_has_its_own_perplexities(workspace: Path, tmp_path: Path) -> None:
    # A directory of its own has no cache: what is measured there is right.
    def config(folder: Path, **teacher: Any) -> str:
        folder.mkdir(exist_ok=True)
        path = write_config(workspace, folder, teacher={"path": str(workspace / "teacher"), **teacher})
        return str(shutil.copyfile(path, folder / f"{len(list(folder.iterdir()))}.yaml"))

    shared, alone = tmp_path / "shared", tmp_path / "alone"
    dequantised = Path(shutil.copytree(workspace / "teacher", tmp_path / "dequantised"))
    fp8 = Path(shutil.copytree(dequantised, tmp_path / "fp8", ignore=shutil.ignore_patterns("*.safetensors")))
    write_fp8(dequantised, fp8, "blocks")
    configs = [config(shared), config(shared, quantize="int8"), config(alone, quantize="int8"), config(shared)]
    configs += [config(shared, path=str(fp8)), config(alone, path=str(dequantised))]
    plain, int8, right, again, in_fp8, in_float32 = run_ranks(
        "tests.dist.resume_worker:teacher_perplexities", 2, timeout_s=400, config_paths=configs
    )
    assert int8 == right != plain
    assert again == plain
    assert in_fp8 == in_float32 != plain
    assert len(list((shared / "runs" / ".teacher-perplexities").iterdir())) == 3 * len(plain)


def test_a_checkpoint_that_cannot_be_written_ends_no_rank(workspace: Path, tmp_path: Path) -> None:
    # DeepSpeed makes directories and copies a script of its own while it saves, on some ranks alone.
    config = write_config(workspace, tmp_path)
    failures = run_ranks(
        "tests.dist.resume_worker:save_where_nothing_can_be_written", 2, timeout_s=100, config_path=str(config)
    )
    assert len(failures) == 2 and all("/dev/null" in failure for failure in failures)
