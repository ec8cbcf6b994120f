"""No rank leaves shared memory behind, even if it is killed: the names are removed while the rank runs."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from ddk_ds.config import Limits
from tests.dist.ranks import run_ranks
from tools.bench.small_run import write_config


def test_no_name_is_left_in_shared_memory() -> None:
    total, names, mapped = run_ranks("tests.dist.runtime_worker:shared_memory", 2)
    assert total == 3.0
    assert not names
    assert mapped  # else DeepSpeed would not use shared memory here, and the test would show nothing


@pytest.mark.long("it compiles DeepSpeed's extension")
def test_a_lock_file_of_a_killed_process_blocks_no_later_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(sys.prefix) / "torch_extensions"))
    shutil.copytree(compiled / "deepspeed_shm_comm", tmp_path / "deepspeed_shm_comm")
    (tmp_path / "deepspeed_shm_comm" / "lock").touch()
    (tmp_path / "deepspeed_shm_comm" / "compiled_for.txt").write_text("older versions")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    total, _, _ = run_ranks("tests.dist.runtime_worker:shared_memory", 2)
    assert total == 3.0


def test_no_collective_ends_before_the_limit_of_a_phase(workspace: Path, tmp_path: Path) -> None:
    """DeepSpeed makes groups without naming a timeout: theirs would be torch's half an hour, or 10 minutes on GPUs."""
    limits, config = Limits(), write_config(workspace, tmp_path)
    found = run_ranks("tests.dist.runtime_worker:timeouts_s", 2, config_path=str(config))
    for maker, timeouts in found.items():
        assert timeouts, f"no group of {maker}: {found}"
        assert min(timeouts) > 2 * max(limits.evaluation_s, limits.export_s), found
