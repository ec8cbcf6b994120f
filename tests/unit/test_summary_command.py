"""Several runs side by side: `ddk summary RUN RUN`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddk_ds.commands.summary_command import main


def write_run(directory: Path, *, teacher: bool, after: dict[str, float]) -> str:
    domains = [
        {
            "name": name,
            "teacher_ppl": 10.0 if teacher else None,
            "student_ppl_before": 50.0,
            "student_ppl_after": ppl,
            "ratio_before": 5.0 if teacher else None,
            "ratio_after": ppl / 10 if teacher else None,
            "tokens": 100,
            "token_share": 1 / len(after),
        }
        for name, ppl in after.items()
    ]
    directory.mkdir()
    means = dict.fromkeys(("mean_ratio_before", "mean_ratio_after"))
    summary = {
        "run": directory.name,
        "domains": domains,
        **means,
        "steps": 2,
        "tokens": 9,
        "wall_s": 1.0,
        "reason": "-",
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    return str(directory)


def test_runs_side_by_side_in_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    one = write_run(tmp_path / "demo", teacher=True, after={"mathematics": 1234.5, "code": 15.0})
    two = write_run(tmp_path / "demo-equal", teacher=True, after={"mathematics": 1016.0, "code": 25.0})
    without = write_run(tmp_path / "no-teacher", teacher=False, after={"mathematics": 900.0})
    assert main([one, two, without]) == 0
    rows = {line[:15].strip(): line[15:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["mathematics"] == ["10.00", "50.00", "1,234.50", "50%", "1,016.00", "50%", "900.00", "100%"]
    assert rows["code"] == ["10.00", "50.00", "15.00", "50%", "25.00", "50%", "-"]
    assert rows["mean ratio"] == ["5.000", "62.475", "52.050", "-"]
    assert rows["largest ratio"] == ["5.000", "123.450", "101.600", "-"]
