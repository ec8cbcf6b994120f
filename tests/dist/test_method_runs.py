"""Whole runs of the methods: broken off and resumed they are the same, and what one leaves the next one takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ddk_ds.config import load_config
from ddk_ds.engine.filters import filter_shape
from ddk_ds.engine.model_files import read_model
from ddk_ds.errors import ConfigError
from tests.dist.ranks import run_ranks
from tests.dist.resume_worker import run_dir
from tools.small_run import without_clock, write_config

SHORT: dict[str, Any] = {
    "mixture": {"interval_steps": 2, "ratio_cap": None, "initial_floor": 0.0},
    "stop": {"steps": 4},
    "checkpoint": {"every_steps": 2},
}


def run_twice(config: Path) -> tuple[list[dict[str, Any]], Path]:
    """Run whole, and broken off within the second interval and resumed; the ledger, which is the same, and a run."""
    names = {"whole": None, "broken": 6}
    assert run_ranks("tests.dist.resume_worker:break_and_resume", 2, config_path=str(config), names=names) == ["broken"]
    whole, broken = (without_clock(run_dir(str(config), name)) for name in names)
    assert broken == whole
    return whole, run_dir(str(config), "broken") / "export"


def test_doremis_proxy(workspace: Path, tmp_path: Path) -> None:
    ledger, export = run_twice(write_config(workspace, tmp_path, method="doremi_proxy", **SHORT))
    steps = [line["method"]["weights"] for line in ledger if line["kind"] == "step"]
    proportions = yaml.safe_load((export / "proportions.yaml").read_text())
    # The mean over all steps, by the domains' names; sampling itself stays equal.
    for number, (name, value) in enumerate(proportions.items()):
        assert value == pytest.approx(sum(weights[number] for weights in steps) / 4)
        assert ledger[0]["proportions"][name] == pytest.approx(1 / 3)
    config = write_config(
        workspace,
        tmp_path / "cpt",
        **{**SHORT, "mixture": {**SHORT["mixture"], "controller": "static", "proportions": proportions}},
        method="cpt",
        teacher=None,
    )
    run_ranks("tests.dist.resume_worker:go_on", 1, config_path=str(config), name="final")
    assert without_clock(run_dir(str(config), "final"))[0]["proportions"] == proportions


def test_teds_stages(workspace: Path, tmp_path: Path) -> None:
    ledger, export = run_twice(write_config(workspace, tmp_path, method="ted_filters", **SHORT))
    ends = [line["student_ppl"] for line in ledger if line["kind"] in ("interval", "end")]
    assert ends[0] == ends[-1], "stage 1 has changed the student"
    trained = load_file(export / "filters.safetensors")
    for name, value in trained.items():
        if name.startswith("teacher."):  # it began as the identity
            assert 1e-3 < float((value - torch.eye(len(value))).abs().max()) < 0.1, name

    sections = {"method": "ted", "ted": {"filters": str(export / "filters.safetensors"), "weight": 0.5}}
    ledger, export = run_twice(write_config(workspace, tmp_path / "stage2", **sections, **SHORT))
    errors = [line["method"]["mse"] for line in ledger if line["kind"] == "step"]
    assert errors[-1] < errors[0]
    left = load_file(export / "filters.safetensors")
    for name, value in trained.items():
        assert bool((left[name] == value).all()) == name.startswith("teacher."), name


def test_equal_by_definition(workspace: Path, tmp_path: Path) -> None:
    """kd with gamma 0 is cpt; ddk with alpha 0 that begins equally is ddk_equal: bit for bit."""
    mixture = {**SHORT["mixture"], "alpha": 0.0, "initial": "equal"}
    runs: dict[str, dict[str, Any]] = {
        "kd": {"method": "kd", "loss": {"gamma": 0.0}},
        "cpt": {"method": "cpt", "teacher": None},
        "ddk": {"method": "ddk", "mixture": mixture},
        "ddk_equal": {"method": "ddk_equal"},
    }
    paths = {
        name: str(write_config(workspace, tmp_path / name, **{**SHORT, **sections})) for name, sections in runs.items()
    }
    run_ranks("tests.dist.resume_worker:train_all", 1, config_paths=paths)
    keys = ("loss", "grad_norm", "student_ppl", "ids_sha")
    kd, cpt, ddk, equal = (
        [{key: record.get(key) for key in keys} for record in without_clock(run_dir(path, name))]
        for name, path in paths.items()
    )
    assert kd == cpt
    assert ddk == equal


def test_filters_that_do_not_fit(workspace: Path, tmp_path: Path) -> None:
    sections = {"method": "ted", "ted": {"filters": str(tmp_path / "none.safetensors")}}
    config = write_config(workspace, tmp_path, **sections, **SHORT)
    with pytest.raises(AssertionError, match=r"ted\.filters .*none\.safetensors: there is no such file"):
        run_ranks("tests.dist.resume_worker:go_on", 1, config_path=str(config), name="x")
    models = (read_model(workspace / name, name) for name in ("student", "teacher"))
    config = write_config(workspace, tmp_path, method="ted_filters", ted={"layers": [[0, 9]]}, **SHORT)
    with pytest.raises(ConfigError, match="the teacher has 3 layers"):
        filter_shape(load_config(config), *models)
    with pytest.raises(ConfigError, match=r"method: ted needs ted\.filters"):
        run_dir(str(write_config(workspace, tmp_path, method="ted", **SHORT)), "x")
