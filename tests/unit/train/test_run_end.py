"""The table at a run's end has a column for each number that the run has, and no others."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ddk_ds.config import make_config
from ddk_ds.engine.model_files import ModelFiles
from ddk_ds.mixture.interval_state import IntervalState
from ddk_ds.train.run_end import _model_name, make_summary, summary_table
from ddk_ds.train.state import RunState


@pytest.mark.parametrize("teacher", [True, False])
def test_a_run_without_a_teacher_has_no_columns_of_one(teacher: bool) -> None:
    sections: dict[str, Any] = {"teacher": {"path": "t"}} if teacher else {"method": "cpt"}
    config = make_config(
        {"name": "r", "student": {"path": "s"}, "data": {"path": "d"}, "stop": {"steps": 2000}, **sections}, "here"
    )
    entries: Any = [{"name": name, "num_samples": 4, "sha": "0"} for name in ("code", "law")]
    state = RunState(data=IntervalState.new(entries, seed=0), domain_tokens=[30, 10], student_before=[8.0, 6.0])
    teacher_ppl = np.array([2.0, 3.0]) if teacher else None
    summary = make_summary(config, state, ["code", "law"], np.array([4.0, 4.5]), teacher_ppl, "done")
    output = io.StringIO()
    Console(file=output, width=100).print(summary_table(summary))
    rows = {line.split()[0]: line.split()[1:] for line in output.getvalue().splitlines() if line.strip()}
    assert rows["code"] == (["2.00", "8.00", "4.00", "4.000", "2.000"] if teacher else ["8.00", "4.00"]) + ["75.0%"]
    assert ("mean" in rows) is teacher and ("ratio" in output.getvalue()) is teacher


@pytest.mark.parametrize(
    ("remembered", "name"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("checkpoints/last one", "student"),  # no name that the hub can have
        ("../models/teacher", "student"),
        ("C:/teacher", "student"),
        ("teacher", "student"),
        ("", "student"),
    ],
)
def test_the_card_names_a_model_as_the_hub_does_only_by_a_name_of_the_hubs_form(
    tmp_path: Path, remembered: str, name: str
) -> None:
    directory = tmp_path / "student"
    directory.mkdir()
    assert _model_name(str(directory), ModelFiles(directory, {"_name_or_path": remembered}, {})) == name
    assert _model_name("owner/model") == "owner/model"
