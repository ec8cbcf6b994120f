"""tools/verify_data.py lists exactly what is broken."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ddk_ds.commands.verify_command import main


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_intact_data_passes(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(prepared)]) == 0
    assert "6 shards" in (out := capsys.readouterr().out) and "0 broken" in out


def test_what_is_broken_is_listed(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "data"
    shutil.copytree(prepared, copy)
    flip(copy / "small/train/shard.00000.mds")
    flip(copy / "tree/validation/shard.00000.mds")
    assert main([str(copy)]) == 1
    out = capsys.readouterr().out
    assert "small/train/shard.00000.mds of domain 'small' is damaged" in out
    assert "tree/validation/shard.00000.mds of domain 'tree' is damaged" in out
    assert "2 broken" in out and "large" not in out


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 2
    assert main(["s3://bucket/data"]) == 2
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["error:", "error:"]
