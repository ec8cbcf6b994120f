"""Identity of a run's directory: options that a resumed run can change, and options that make it another run."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.config import Config
from ddk_ds.errors import CheckpointError, ConfigError
from ddk_ds.train.checkpoint.checkpoint_files import FORMAT
from ddk_ds.train.run_dir import check_run_dir, claim_run_dir, run_identity
from tests.unit.train.short_config import config_of


def resume(old: Config, new: Config) -> None:
    """Start `new` in the directory in which `old` ran."""
    claim_run_dir(old, run_identity(old, {}))
    check_run_dir(new, run_identity(new, {}))


def test_a_full_disk_is_one_error(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config.run_dir.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # files can be made, and not a byte be written
    try:
        with pytest.raises(CheckpointError, match=r"run cannot be written: File too large; make room, then start"):
            claim_run_dir(config, run_identity(config, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    claim_run_dir(config, run_identity(config, {}))


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


@pytest.mark.parametrize("other", [3, None])
def test_a_directory_of_another_format_is_refused(tmp_path: Path, other: int | None) -> None:
    config = config_of(tmp_path)
    identity = run_identity(config, {})
    claim_run_dir(config, {**identity, "format": other})
    with pytest.raises(CheckpointError, match=rf"has format {other}, .* writes format {FORMAT}: continue it with the"):
        check_run_dir(config, identity)


def test_a_kill_in_the_first_write_does_not_keep_the_directory(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    identity = run_identity(config, {})
    config.run_dir.mkdir(parents=True)
    left = config.run_dir / ".run.json.1.partial"
    left.write_text("{")
    check_run_dir(config, identity)
    claim_run_dir(config, identity)
    assert not left.exists() and json.loads((config.run_dir / "run.json").read_text()) == identity
    (config.run_dir / "run.json").unlink()
    (config.run_dir / ".mine.partial").touch()
    with pytest.raises(CheckpointError, match="holds files of something else"):
        check_run_dir(config, identity)


def test_where_the_teacher_lies_is_free(tmp_path: Path) -> None:
    resume(config_of(tmp_path), config_of(tmp_path, teacher={"path": "elsewhere", "shard_within": "node"}))


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


WITHOUT = {"mixture.history_exponent": 0.5, "loss.chunk_tokens": None, "optimizer.betas": [0.9, 0.95]}
"""Options of each kind of value, with their defaults, as if a later version had brought them."""


def before_options(config: Config, options: Iterable[str]) -> None:
    """Begin a run as a version did that did not know these options."""
    identity = run_identity(config, {})
    claim_run_dir(config, {key: value for key, value in identity.items() if key not in options})


def test_a_run_goes_on_with_a_version_that_has_more_options(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert {key: run_identity(config, {})[key] for key in WITHOUT} == WITHOUT
    before_options(config, WITHOUT)
    check_run_dir(config, run_identity(config, {}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"chunk_tokens": 64}}, "loss.chunk_tokens was None, is 64"),
        ({"optimizer": {"betas": [0.9, 0.99]}}, r"optimizer.betas was None, is \[0.9, 0.99\]"),
    ],
)
def test_such_an_option_with_another_value_is_another_run(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    before_options(config_of(tmp_path), WITHOUT)
    with pytest.raises(CheckpointError, match=message):
        check_run_dir(config_of(tmp_path, **sections), run_identity(config_of(tmp_path, **sections), {}))


def test_a_section_that_is_turned_on_is_another_run(tmp_path: Path) -> None:
    """Its options have defaults; the section has none but its absence."""
    config = config_of(tmp_path, teacher={"cache": {"path": "cache"}})
    cached = [key for key in run_identity(config, {}) if key.startswith("teacher.cache.")]
    assert cached
    before_options(config, cached)
    with pytest.raises(CheckpointError, match=r"teacher\.cache\.\w+ was None, is "):
        check_run_dir(config, run_identity(config, {}))


def test_an_option_that_is_gone_is_another_run(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    identity = run_identity(config, {})
    claim_run_dir(config, {**identity, "mixture.mirror": None, "mixture.mirrors": 2})
    with pytest.raises(CheckpointError, match=r"mixture.mirrors was 2, is None"):
        check_run_dir(config, identity)


def test_a_file_that_was_not_there_is_another_run(tmp_path: Path) -> None:
    """Fingerprints are no options: they have no defaults."""
    config = config_of(tmp_path)
    claim_run_dir(config, run_identity(config, {}))
    with pytest.raises(CheckpointError, match=r"content.filters was None, is 'abc'"):
        check_run_dir(config, run_identity(config, {"filters": "abc"}))
