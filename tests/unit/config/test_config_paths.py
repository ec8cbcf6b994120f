"""Paths: relative ones begin at the file that names them, those of the shell at the working directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ddk_ds.commands.distill_rank import main
from ddk_ds.comparison.comparison_jobs import read_grid
from ddk_ds.comparison.method_stages import differences
from ddk_ds.config import Config, load_config, make_config, to_yaml
from ddk_ds.config.keys import all_keys
from ddk_ds.config.paths import path_keys
from ddk_ds.data.recipe import load_recipe
from ddk_ds.errors import CheckpointError, ConfigError
from ddk_ds.train.run_dir import check_run_dir, claim_run_dir, run_identity

PATHS = {
    "student.path": "../models/student",
    "teacher.path": "models/teacher",
    "teacher.cache.path": "said",
    "data.path": "../data",
    "data.cache_dir": "cache",
    "init_from": "../runs/old",
    "ted.filters": "filters.safetensors",
    "mixture.schedule_file": "stages.yaml",
    "train.nvme_path": "/local/nvme",
    "monitor.prometheus_file": "run.prom",
    "monitor.sample_prompts": "prompts.txt",
    "output_dir": "../runs",
}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with configs/ and two models below it; it is the working directory."""
    for folder in ("configs/models/teacher", "models/student", "data"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, values: dict[str, Any]) -> Path:
    """Write a configuration with these values at dotted keys, and return its path."""
    config = OmegaConf.create({"name": "run", "stop": {"steps": 2000}, "monitor": {"samples_every": 100}})
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    path.write_text(OmegaConf.to_yaml(config))
    return path


def flat(config: Config) -> dict[str, Any]:
    """Return the values of all path keys."""
    values = OmegaConf.create(config.model_dump(mode="json"))
    return {key: OmegaConf.select(values, key) for key in PATHS}


def test_paths_by_domain(clone: Path) -> None:
    """Those of the file begin at its directory, those of overrides where the command is started; a hub's name stays."""
    (clone / "configs/models/web").mkdir()
    values = {**PATHS, "mixture.controller": "schedule", "teacher.cache.mode": "read_only"}
    others = {"teacher.by_domain.web": "models/web", "teacher.by_domain.code": "org/coder"}
    file = write(clone / "configs/run.yaml", {**values, **others})
    found = load_config(file, ["teacher.by_domain.news=models/student"])
    assert found.teacher is not None and found.teacher.by_domain == {
        "web": f"{clone}/configs/models/web",
        "code": "org/coder",
        "news": f"{clone}/models/student",
    }
    wrong = load_config(file, ["teacher.by_domain.web=models/web"])
    with pytest.raises(
        ConfigError, match=r"teacher.by_domain.web: there is no .*/models/web: .*; the command line names"
    ):
        wrong.check_paths("teacher.by_domain.web")


def test_every_path_of_a_file_begins_at_its_directory(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(path_keys(Config)) == {*PATHS, "teacher.by_domain"}
    values = {**PATHS, "mixture.controller": "schedule"}
    found = flat(load_config(write(clone / "configs/run.yaml", values)))
    assert found == {
        "student.path": f"{clone}/models/student",
        "teacher.path": f"{clone}/configs/models/teacher",
        "teacher.cache.path": f"{clone}/configs/said",
        "data.path": f"{clone}/data",
        "data.cache_dir": f"{clone}/configs/cache",
        "init_from": f"{clone}/runs/old",
        "ted.filters": f"{clone}/configs/filters.safetensors",
        "mixture.schedule_file": f"{clone}/configs/stages.yaml",
        "train.nvme_path": "/local/nvme",
        "monitor.prometheus_file": f"{clone}/configs/run.prom",
        "monitor.sample_prompts": f"{clone}/configs/prompts.txt",
        "output_dir": f"{clone}/runs",
    }
    for place, name in ((clone / "data", "../configs/run.yaml"), (Path("/"), f"{clone}/configs/run.yaml".lstrip("/"))):
        monkeypatch.chdir(place)
        assert flat(load_config(name)) == found


def test_a_path_is_marked_where_its_text_says_so() -> None:
    described = {key for key, field in all_keys(Config) if "path" in key or key.endswith(("_dir", "_file"))}
    assert described <= set(path_keys(Config))


def test_an_override_and_the_default_begin_at_the_working_directory(clone: Path) -> None:
    config = write(clone / "configs/run.yaml", {"student.path": "../models/student", "data.path": "../data"})
    given = [
        "student.path=configs/models/teacher",
        "data={path: configs}",
        "init_from=old",
        "teacher.path=models/student",
    ]
    found = flat(load_config(config, given))
    assert found["student.path"] == f"{clone}/configs/models/teacher" and found["data.path"] == f"{clone}/configs"
    assert found["init_from"] == f"{clone}/old" and found["teacher.path"] == f"{clone}/models/student"
    assert found["output_dir"] == f"{clone}/runs"
    assert flat(load_config(config, [*given, "output_dir=elsewhere"]))["output_dir"] == f"{clone}/elsewhere"
    values = OmegaConf.to_container(OmegaConf.load(config))
    assert isinstance(values, dict)
    values |= {"method": "cpt", "student": {"path": "models/student"}}
    assert make_config(values, "a notebook").student.path == f"{clone}/models/student"


def test_an_interpolation_takes_over_the_absolute_path(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "models")
    same = {"student.path": "../models/student", "teacher.path": "${student.path}", "data.path": "${oc.env:WHERE}/x"}
    config = write(clone / "configs/run.yaml", same)
    assert flat(load_config(config))["teacher.path"] == f"{clone}/models/student"
    found = flat(load_config(config, ["student.path=models/other"]))
    assert found["teacher.path"] == found["student.path"] == "models/other"  # no such directory: a name on the hub
    (clone / "models/other").mkdir()
    found = flat(load_config(config, ["student.path=models/other"]))
    assert found["teacher.path"] == found["student.path"] == f"{clone}/models/other"
    assert found["data.path"] == f"{clone}/models/x"


def test_names_on_the_hub_and_addresses_stay(clone: Path) -> None:
    values = {"student.path": "Qwen/Qwen1.5-1.8B", "teacher.path": "gpt2", "data.path": "s3://bucket/data"}
    config = load_config(write(clone / "configs/run.yaml", {**values, "data.cache_dir": "~/cache"}))
    assert {key: flat(config)[key] for key in values} == values
    assert config.data.cache_dir == str(Path.home() / "cache")
    config.check_paths()
    local = load_config(write(clone / "configs/run.yaml", {**values, "data.path": "../data", "student.path": "./Qwen"}))
    with pytest.raises(ConfigError, match=rf"student.path: there is no {clone}/configs/Qwen: .*names it './Qwen'"):
        local.check_paths()


def test_a_link_keeps_its_own_path_unless_it_is_left_again(
    clone: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "shared"
    (elsewhere / "deep").mkdir(parents=True)
    (clone / "link").symlink_to(elsewhere / "deep")
    values = {"student.path": "Qwen/a", "method": "cpt", "data.path": "link/data", "output_dir": "link/../runs"}
    config = load_config(write(clone / "run.yaml", values))
    assert config.data.path == f"{clone}/link/data" and config.output_dir == f"{elsewhere}/runs"


@pytest.mark.parametrize("shell", [False, True])
def test_a_path_that_is_meant_from_the_other_side_is_named(
    clone: Path, capsys: pytest.CaptureFixture[str], shell: bool
) -> None:
    right = {"student.path": "../models/student", "teacher.path": "models/teacher", "data.path": "../data"}
    config = write(clone / "configs/run.yaml", right | ({} if shell else {"data.path": "models/student"}))
    given = ["data.path=models/teacher"] if shell else []
    assert main(["--config", str(config.relative_to(clone)), "--dry-run", *given]) == 2
    text = capsys.readouterr().err
    if shell:
        tried, meant, fix = "models/teacher", "configs/models/teacher", "configs/models/teacher"
        rule = "the command line names it 'models/teacher', and a relative path begins where the command is started"
    else:
        tried, meant, fix = "configs/models/student", "models/student", "../models/student"
        rule = "configs/run.yaml names it 'models/student', and a relative path begins at the directory of the file"
    assert f"error: data.path: there is no {clone}/{tried}: make it with `ddk prepare`" in text and rule in text
    assert f"for {clone}/{meant} write {fix}\n" in text


def test_a_model_that_the_hub_could_have_is_not_asked_for_if_a_directory_was_meant(clone: Path) -> None:
    values = {"student.path": "models/student", "teacher.path": "models/teacher", "data.path": "../data"}
    config = load_config(write(clone / "configs/run.yaml", values))
    with pytest.raises(ConfigError, match=rf"student.path: .* for {clone}/models/student write ../models/student$"):
        config.check_paths()
    config.check_paths("teacher.path", "data.path")


def test_the_printed_configuration_is_read_to_an_equal_one_from_anywhere(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write(clone / "configs/run.yaml", {**PATHS, "mixture.controller": "schedule"}))
    (clone / "data/printed.yaml").write_text(to_yaml(config))
    monkeypatch.chdir("/")
    assert load_config(clone / "data/printed.yaml") == config


def test_a_run_goes_on_from_another_place_and_another_directory(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**PATHS, "mixture.controller": "schedule", "init_from": None}
    (clone / "configs/stages.yaml").write_text("[]")
    config = load_config(write(clone / "configs/run.yaml", values))
    content = {"schedule": [[0, 0.5]]}
    claim_run_dir(config, run_identity(config, content))
    moved = clone.with_name("moved")
    clone.rename(moved)
    monkeypatch.chdir("/")
    again = load_config(moved / "configs/run.yaml")
    check_run_dir(again, run_identity(again, content))
    recorded = load_config(again.run_dir / "config.yaml")
    assert recorded == config and differences(recorded, again) == []
    # What the paths lead to is compared by its content, so the check is as strict as before.
    with pytest.raises(CheckpointError, match=r"content\.schedule was"):
        check_run_dir(again, run_identity(again, {"schedule": [[0, 0.25]]}))
    other = load_config(moved / "configs/run.yaml", ["data.path=data"])
    assert differences(recorded, other) == [("data.path", f"{clone}/data", "/data")]


def test_a_grid_names_its_own_paths(clone: Path) -> None:
    grid = clone / "configs/grid.yaml"
    items = ["teacher.path=models/teacher", "student.path=Qwen/a", "data.path=../my data", "loss.gamma=0.1"]
    grid.write_text(json.dumps({"variants": {"a": items}}))
    teacher, student, data, gamma = read_grid(Path("configs/grid.yaml"))["a"]
    config = write(clone / "run.yaml", {"student.path": "x", "teacher.path": "y", "data.path": "z"})
    found = flat(load_config(config, [teacher, student, data]))
    assert found["teacher.path"] == f"{clone}/configs/models/teacher" and found["data.path"] == f"{clone}/my data"
    assert found["student.path"] == "Qwen/a" and gamma == "loss.gamma=0.1"


def test_a_recipe_follows_the_same_rule(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = clone / "configs/recipe.yaml"
    domains = "domains: {code: {sources: ['*.txt']}}"
    recipe.write_text(f"root: text\n{domains}")
    assert load_recipe(recipe).root == f"{clone}/configs/text"
    assert load_recipe(recipe, ["root=text"]).root == f"{clone}/text"
    recipe.write_text("root: ${oc.env:DDK_TEXT}\n" + domains)
    monkeypatch.setenv("DDK_TEXT", "text")
    assert load_recipe(Path("configs/recipe.yaml")).root == f"{clone}/text"
    monkeypatch.setenv("DDK_TEXT", "s3://bucket/text")
    assert load_recipe(recipe).root == "s3://bucket/text"


@pytest.mark.parametrize("name", ["demo", "demo_teacher", "demo_student", "experiments/small"])
def test_a_configuration_of_the_project_stays_in_the_clone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[3]
    monkeypatch.chdir("/")
    found = flat(load_config(root / f"configs/{name}.yaml"))
    assert found["output_dir"] == f"{root}/runs"
    assert all(str(found[key]).startswith(f"{root}/runs/") for key in ("student.path", "data.path"))
