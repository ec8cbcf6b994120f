"""`ddk teach` with several teachers: the launcher is started once for each, until one fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddk_ds.commands import teach_command
from tools.bench.small_run import write_config


def test_one_start_for_each_teacher(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = {"path": str(tmp_path / "cache"), "mode": "read_only"}
    others = {"cpp": str(workspace / "student"), "python": str(workspace / "tokenizer")}
    teacher = {"path": str(workspace / "teacher"), "cache": cache, "by_domain": others}
    config = write_config(workspace, tmp_path, teacher=teacher)
    starts: list[list[str]] = []
    codes = iter([0, 0, 0, 0, 7])

    def started(command: list[str]) -> int:
        starts.append(command)
        return next(codes)

    monkeypatch.setattr(teach_command, "launcher_command", lambda _, run: run)
    monkeypatch.setattr(teach_command, "run_launcher", started)
    assert teach_command.main(["--config", str(config), "--samples", "9"]) == 0
    domains = [next(word for word in command if word.startswith("data.domains")) for command in starts]
    paths = [next(word for word in command if word.startswith("teacher.path")) for command in starts]
    assert domains == ["data.domains=[python]", "data.domains=[cpp]", "data.domains=[mathematics]"]
    assert paths == [f'teacher.path="{path}"' for path in (others["python"], others["cpp"], workspace / "teacher")]
    assert all("--teach=9" in command and "teacher.cache.mode=write_through" in command for command in starts)
    assert teach_command.main(["--config", str(config), "--samples", "9"]) == 7
    assert len(starts) == 5, "what comes after a failure is not started"
    assert teach_command.main(["--config", str(config), f"teacher.by_domain.cp={workspace / 'student'}"]) == 2
    assert "teacher.by_domain: 'cp' is not a domain of this run: did you mean 'cpp'?" in capsys.readouterr().err
