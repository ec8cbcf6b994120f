"""What a rank sets before torch is imported, and what it leaves as the user has set it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from ddk_ds.train.preflight.machine import compiler
from ddk_ds.train.rank_environment import set_rank_environment

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_LAUNCH_ORDER_IMPLICIT", *CACHES)


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def found() -> dict[str, str]:
    set_rank_environment()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_what_nobody_has_set(tmp_path: Path) -> None:
    own = tmp_path / f"ddk-{os.getuid()}"
    expected = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NCCL_LAUNCH_ORDER_IMPLICIT": "1",
        "TRITON_CACHE_DIR": str(own / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(own / "inductor"),
    }
    assert found() == expected == found()
    assert own.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    values = found()
    assert values[name] == "" and len(values) == 4  # one of torch's two names is enough


def test_no_code_from_a_directory_that_others_can_write_to(tmp_path: Path) -> None:
    other = tmp_path / f"ddk-{os.getuid()}"
    other.mkdir()
    other.chmod(0o777)
    assert not found().keys() & set(CACHES)
    other.rmdir()
    other.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    assert not found().keys() & set(CACHES)


def test_it_comes_before_torch() -> None:
    """torch reads the allocator's variable once, NCCL its own when a communicator is made."""
    code = """
import os, sys
from types import SimpleNamespace
os.environ["RANK"] = "0"
from ddk_ds.commands import distill_rank
distill_rank.Watchdog = lambda limits: limits
distill_rank.set_rank_environment = lambda: sys.exit(8 if "torch" in sys.modules else 9)
distill_rank._run(SimpleNamespace(limits=0), dry_run=False, preflight=False, ranks=1, readers=None)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=90).returncode == 9


def test_a_missing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    row = compiler("cuda")
    assert row.status == "fail" and "C compiler (no CC, gcc or clang)" in row.found and "python3-dev" in row.fix
    assert compiler("cpu").status == "pass"
    gcc = tmp_path / "gcc"
    gcc.touch(mode=0o755)
    assert compiler("cuda").found.startswith(f"{gcc}, ")
    monkeypatch.setenv("CC", "/opt/gone/cc")
    assert "C compiler (/opt/gone/cc)" in compiler("cuda").found
    monkeypatch.delenv("CC")
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    assert compiler("cuda").status == "fail" and "Python.h" in compiler("cuda").found
