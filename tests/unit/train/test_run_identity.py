"""Whose directory it is: what a resumed run may change, and what makes it another run; policies among it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.config import Config, make_config
from ddk_ds.errors import CheckpointError, ConfigError
from ddk_ds.train.run_dir import check_run_dir, claim_run_dir, run_identity


def config_of(folder: Path, **sections: Any) -> Config:
    values: dict[str, Any] = {
        "name": "run",
        "output_dir": str(folder),
        "student": {"path": "student"},
        "teacher": {"path": "teacher"},
        "data": {"path": "data"},
        "stop": {"intervals": 2},
    }
    return make_config({**values, **sections}, "test")


def resume(old: Config, new: Config) -> None:
    """Start `new` where `old` ran."""
    claim_run_dir(old, run_identity(old, {}))
    check_run_dir(new, run_identity(new, {}))


STOP = {"exhaustion": "stop"}
CAP = {"exhaustion_by_domain": {"code": "cap"}, "max_passes": 2.0}


@pytest.mark.parametrize("mixture", [{}, STOP, CAP])
def test_the_same_policy_goes_on(tmp_path: Path, mixture: dict[str, Any]) -> None:
    resume(config_of(tmp_path, mixture=mixture), config_of(tmp_path, mixture=mixture))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({}, STOP, "mixture.exhaustion was 'cycle', is 'stop'"),
        (STOP, {**STOP, "max_passes": 2}, "mixture.max_passes was None, is 2.0"),
        (CAP, {**CAP, "max_passes": 3}, "mixture.max_passes was 2.0, is 3.0"),
        (CAP, {**CAP, "exhaustion_by_domain": {"code": "stop"}}, "exhaustion_by_domain.code was 'cap', is 'stop'"),
        (CAP, {}, "mixture.exhaustion_by_domain.code was 'cap', is None"),
    ],
)
def test_another_policy_is_another_run(tmp_path: Path, old: dict[str, Any], new: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resume(config_of(tmp_path, mixture=old), config_of(tmp_path, mixture=new))


def test_a_directory_from_before_the_policies(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    claim_run_dir(config, {})
    identity = run_identity(config, {})
    old = {key: value for key, value in identity.items() if "exhaustion" not in key and "max_passes" not in key}
    (config.run_dir / "run.json").write_text(json.dumps({**old, "train.micro_batch_samples": 7}))
    check_run_dir(config, identity)
    capped = config_of(tmp_path, mixture=CAP)
    with pytest.raises(CheckpointError, match=r"mixture.exhaustion_by_domain.code was None, is 'cap'"):
        check_run_dir(capped, run_identity(capped, {}))


OPTIONS_OF_THE_STEP = (
    "student.whole_layers",
    "student.compile_layers",
    "teacher.compile_layers",
    "teacher.quantize",
    "optimizer.fused",
)
AS_IT_WAS: dict[str, Any] = {
    "student": {"path": "student", "whole_layers": False},
    "optimizer": {"fused": False},
}


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """Of a run from before the options of its step: its identity has none of them."""
    config = config_of(tmp_path)
    identity = run_identity(config, {})
    assert set(OPTIONS_OF_THE_STEP) <= identity.keys()
    claim_run_dir(config, {key: identity[key] for key in identity if key not in OPTIONS_OF_THE_STEP})
    return tmp_path


def test_a_directory_from_before_the_steps_options(older: Path) -> None:
    """It is gone on with as it was, wherever the teacher's weights lie, and refused by name under today's defaults."""
    moved = {"path": "teacher", "shard_within": "node", "micro_batches_per_pass": 4}
    for config in (config_of(older, **AS_IT_WAS), config_of(older, **AS_IT_WAS, teacher=moved)):
        check_run_dir(config, run_identity(config, {}))
    today = config_of(older)
    with pytest.raises(CheckpointError, match=r"optimizer\.fused was False, is True; student\.whole_layers was False"):
        check_run_dir(today, run_identity(today, {}))


def test_a_run_without_a_teacher_goes_on(tmp_path: Path) -> None:
    config = config_of(tmp_path, method="cpt", teacher=None, mixture={"controller": "equal"})
    resume(config, config)
    assert json.loads((config.run_dir / "run.json").read_text()) == run_identity(config, {})


def test_the_topology_is_free(tmp_path: Path) -> None:
    moved = config_of(tmp_path, train={"micro_batch_samples": 4}, data={"path": "elsewhere", "num_workers": 3})
    resume(config_of(tmp_path), moved)
    other = config_of(tmp_path, train={"global_batch_samples": 128})
    with pytest.raises(CheckpointError, match=r"train.global_batch_samples was 256, is 128"):
        check_run_dir(other, run_identity(other, {}))


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"exhaustion": "cap"}, "mixture: exhaustion: cap needs a limit: set mixture.max_passes"),
        ({"exhaustion_by_domain": {"code": "cap"}}, "cap needs a limit"),
        ({"max_passes": 2}, "max_passes is 2, but every domain cycles"),
        ({"exhaustion": "halt"}, "mixture.exhaustion: .*'halt'"),
        ({"exhaustion_by_domain": {"code": "halt"}}, "mixture.exhaustion_by_domain.code: .*'halt'"),
        ({"exhaustion": "stop", "max_passes": 0}, "mixture.max_passes: .*got 0"),
    ],
)
def test_policies_that_do_not_fit(tmp_path: Path, mixture: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, mixture=mixture)
