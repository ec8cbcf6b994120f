"""A run's directory from before an option: gone on with as it was, refused by name under another default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.config import Config, make_config
from ddk_ds.errors import CheckpointError
from ddk_ds.train.run_dir import check_run_dir, run_identity

NEW = (
    "student.whole_layers",
    "student.compile_layers",
    "teacher.compile_layers",
    "teacher.quantize",
    "optimizer.fused",
)


def config_of(folder: Path, **sections: Any) -> Config:
    values: dict[str, Any] = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"path": "d"}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return make_config({"name": "run", "output_dir": str(folder), "stop": {"steps": 2000}, **values}, "test")


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A directory whose identity has none of the options that came later."""
    identity = run_identity(config_of(tmp_path), {})
    assert set(NEW) <= identity.keys()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps({key: identity[key] for key in identity if key not in NEW}))
    return tmp_path


def test_as_it_was(older: Path) -> None:
    config = config_of(older, student={"whole_layers": False}, optimizer={"fused": False})
    check_run_dir(config, run_identity(config, {}))


def test_under_todays_defaults(older: Path) -> None:
    config = config_of(older)
    with pytest.raises(CheckpointError, match=r"optimizer\.fused was False, is True; student\.whole_layers was False"):
        check_run_dir(config, run_identity(config, {}))


def test_where_the_weights_lie_is_free(older: Path) -> None:
    free = {"shard_within": "node", "micro_batches_per_pass": 4}
    config = config_of(older, student={"whole_layers": False}, optimizer={"fused": False}, teacher=free)
    check_run_dir(config, run_identity(config, {}))


def test_a_run_without_a_teacher(tmp_path: Path) -> None:
    values = {"student": {"path": "s"}, "data": {"path": "d"}, "method": "cpt", "stop": {"steps": 2000}}
    config = make_config({"name": "run", "output_dir": str(tmp_path), **values}, "test")
    identity = run_identity(config, {})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps(identity))
    check_run_dir(config, identity)
