"""Methods by name: what each sets and needs, and that other rooms know no name."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from ddk_ds.config import METHODS, load_config, make_config, to_yaml
from ddk_ds.config.keys import value_at
from ddk_ds.engine.flops import count_forward_flops, training_flops
from ddk_ds.errors import ConfigError
from ddk_ds.methods.distillation import scheduled

ROOT = Path(__file__).parents[2]


def config_of(**sections: Any) -> Any:
    values = {
        "name": "run",
        "student": {"path": "student"},
        "teacher": {"path": "teacher"},
        "data": {"path": "data"},
        "stop": {"steps": 4000},
    }
    return make_config({key: value for key, value in {**values, **sections}.items() if value is not None}, "test")


# Controller and divergence of each method: the table of docs/methods.md. The last two compute no divergence.
MEANS = {
    "kd": ("by_size", "forward_kl"),
    "ddk": ("ddk", "forward_kl"),
    "ddk_no_smoothing": ("ddk_no_smoothing", "forward_kl"),
    "ddk_equal": ("equal", "forward_kl"),
    "minillm": ("by_size", "reverse_kl"),
    "ted": ("by_size", "forward_kl"),
    "cpt": ("by_size", "forward_kl"),
    "ted_filters": ("by_size", "forward_kl"),
    "doremi_proxy": ("equal", "forward_kl"),
}


BY_DEFINITION = {
    "ddk_no_smoothing": "mixture.controller",
    "ddk_equal": "mixture.controller",
    "minillm": "loss.divergence",
    "doremi_proxy": "mixture.controller",
}
OTHERS = {"mixture.controller": "doremi_online", "loss.divergence": "jensen_shannon"}


def write_config(path: Path, method: str | None, values: dict[str, str]) -> Path:
    sections = [f"{section}: {{{key}: {value}}}" for (section, _, key), value in split(values)]
    teacher = [] if method == "cpt" else ["teacher: {path: teacher}"]
    filters = ["ted: {filters: filters.safetensors}"] if method == "ted" else []
    lines = [f"method: {method}"] if method else []
    base = ["name: run", "student: {path: student}", "data: {path: data}", "stop: {steps: 4000}"]
    path.write_text("\n".join([*lines, *base, *teacher, *filters, *sections]))
    return path


def split(values: dict[str, str]) -> list[tuple[tuple[str, str, str], str]]:
    return [(name.partition("."), value) for name, value in values.items()]


def overrides_for(method: str) -> list[str]:
    """Return the override of the method and what it needs besides."""
    more = {"cpt": ["teacher=null"], "ted": ["ted.filters=filters.safetensors"]}
    return [f"method={method}", *more.get(method, [])]


@pytest.mark.parametrize("method", METHODS)
def test_an_overridden_method_means_what_it_says(tmp_path: Path, method: str) -> None:
    """The table of docs/methods.md: what the method sets, whatever the file's own method was; else both are named."""
    for other in ("ddk", "kd", None):
        config = load_config(write_config(tmp_path / "run.yaml", other, {}), overrides_for(method))
        assert (config.mixture.controller, config.loss.divergence) == MEANS[method]

    for key, value in OTHERS.items():
        if method in ("cpt", "ted_filters", "doremi_proxy") and key == "loss.divergence":
            continue  # they compute no divergence
        path = write_config(tmp_path / "run.yaml", None, {key: value})
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides_for(method))
        own = dict(zip(OTHERS, MEANS[method], strict=True))[key]
        assert f"override method={method} is {key}: {own} and contradicts {path}: {key}: {value}" in str(caught.value)
        # Given as an override too, it is meant: unless the method would no longer be what its name says.
        both = [*overrides_for(method), f"{key}={value}"]
        if BY_DEFINITION.get(method) == key:
            with pytest.raises(ConfigError, match=rf"contradicts override {key}={value}: remove {key}$"):
                load_config(path, both)
            with pytest.raises(ConfigError, match=rf"method: {method} is {key}: .* contradicts .*: {key}: {value}"):
                load_config(write_config(tmp_path / "own.yaml", method, {key: value}))
        elif method != "cpt":  # a mixture that needs no teacher has its own test
            assert value_at(load_config(path, both).model_dump(), key) == value
            in_file = load_config(write_config(tmp_path / "own.yaml", method, {key: value}))
            assert value_at(in_file.model_dump(), key) == value
        # The same value is no contradiction.
        same = write_config(tmp_path / "run.yaml", None, {key: own})
        assert value_at(load_config(same, overrides_for(method)).model_dump(), key) == own


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_do_not_repeat_their_method(path: Path) -> None:
    """So every method can be an override of them."""
    values = yaml.safe_load(path.read_text())
    if "student" not in values:
        return
    own = METHODS[values.get("method", "ddk")].sets
    assert [key for key, value in own.items() if value_at(values, key) == value] == []
    if "teacher" in values:
        for method, means in MEANS.items():
            config = load_config(path, overrides_for(method))
            assert (config.mixture.controller, config.loss.divergence) == means


def test_the_resolved_configuration_is_its_own(tmp_path: Path) -> None:
    config = config_of(method="minillm", mixture={"interval_steps": 7})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("method", [name for name, preset in METHODS.items() if preset.teacher])
def test_a_method_without_its_teacher(method: str) -> None:
    with pytest.raises(ConfigError, match=f"method: {method} needs a teacher: set teacher.path"):
        config_of(method=method, teacher=None)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": "cpt"}, "method: cpt takes no teacher"),
        (
            {"method": "cpt", "teacher": None, "mixture": {"controller": "ddk"}},
            "controller: ddk compares with a teacher",
        ),
        ({"method": "cpt", "teacher": None, "mixture": {"controller": "sheared_llama"}}, "compares with a teacher"),
        ({"method": "ted"}, "method: ted needs ted.filters"),
        ({"method": "dkd"}, "method: input should be 'cpt', 'kd'"),
        ({"method": "ted_filters", "ted": {"layers": []}}, "ted.layers"),
    ],
)
def test_what_does_not_go_together(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**sections)
    assert message in str(caught.value)


def test_reference_losses_take_the_teachers_place() -> None:
    mixture = {"controller": "sheared_llama", "reference_losses": {"a": 2.0}}
    assert config_of(method="cpt", teacher=None, mixture=mixture).mixture.controller == "sheared_llama"


def test_the_loop_knows_no_method() -> None:
    """Loop and step know the protocol alone: they import no method and ask for no property of one."""
    for name in ("loop", "step"):
        for node in ast.walk(ast.parse((ROOT / f"ddk_ds/train/{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom):
                imported = {alias.name for alias in node.names}
                if node.module == "ddk_ds.methods":
                    assert imported <= {"IGNORE_INDEX", "Batch", "Method", "own_labels"}, f"{name}: {imported}"
                assert node.module is None or not node.module.startswith("ddk_ds.methods."), node.module
            if isinstance(node, ast.Attribute) and node.attr in ("method", "preset"):
                assert ast.unparse(node.value) in ("state", "metrics"), ast.unparse(node)


# Literals of these rooms that are spelt like a method and name something else.
OTHER_NAMES = {
    ("planner/known_points.py", "cpt"): "the configurations of measured points",
    ("planner/known_points.py", "kd"): "the configurations of measured points",
    ("planner/run_plan.py", "cpt"): "a key of the plan's JSON",
    ("planner/run_plan.py", "kd"): "a key of the plan's JSON",
    ("planner/run_plan.py", "ddk"): "a key of the plan's JSON",
    ("train/run_dir.py", "ted"): "a section of the configuration",
    ("train/run_end.py", "ddk"): "a tag of model cards",
}


def method_names_in(tree: ast.AST) -> set[str]:
    """Return the string literals that are names of methods."""
    values = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {value for value in values if isinstance(value, str) and value in METHODS}


def decisions_by_name(tree: ast.AST) -> list[str]:
    """Return the expressions that compare a configuration's `method`, look something up by it or call its methods."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Compare():
                used = [node.left, *node.comparators]
            case ast.Match():
                used = [node.subject]
            case ast.Subscript():
                used = [node.slice]
            case ast.Attribute():
                used = [node.value]
            case _:
                continue
        found += [ast.unparse(node) for x in used if isinstance(x, ast.Attribute) and x.attr == "method"]
    return found


def test_other_rooms_ask_for_a_methods_properties() -> None:
    """Names of methods are in config/methods.py, methods/ and comparison/, whose columns they are, and nowhere else."""
    names = set()
    for room in ("engine", "train", "planner", "report"):
        for path in sorted((ROOT / "ddk_ds" / room).rglob("*.py")):
            tree, file = ast.parse(path.read_text()), path.relative_to(ROOT / "ddk_ds").as_posix()
            names |= {(file, name) for name in method_names_in(tree)}
            assert decisions_by_name(tree) == [], file
    assert names == set(OTHER_NAMES)


@pytest.mark.parametrize(
    "source",
    [
        'if config.method == "x": pass',
        'run = config.method in ("x", "y")',
        'run = config.method.startswith("x")',
        "text = TEXTS[plan.config.method]",
        "match config.method:\n    case 'x': pass",
    ],
)
def test_a_decision_by_name_is_found(source: str) -> None:
    assert len(decisions_by_name(ast.parse(source))) == 1
    assert decisions_by_name(ast.parse("text = f'method {config.method}'")) == []


def test_what_changes_over_the_run() -> None:
    assert scheduled(0.2, None, 0.7) == 0.2
    assert [scheduled(1.0, 3.0, progress) for progress in (0.0, 0.25, 1.0)] == [1.0, 1.5, 3.0]


def test_ddks_own_flops_over_kds() -> None:
    """Qwen1.5 14B -> 1.8B, K = 1,000 steps of 256 x 2,048 tokens. The teacher is measured once, in the whole run."""
    forward = {}
    for name in ("14B", "1.8B"):
        values = AutoConfig.from_pretrained(ROOT / f"configs/models/Qwen1.5-{name}.json")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(values)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        forward[name] = count_forward_flops(shapes, values.to_dict(), 2048)
    interval = 1000 * 256 * 2048 * training_flops(config_of(method="kd"), forward["1.8B"], forward["14B"])
    ours = {tokens: tokens * forward["1.8B"] / interval for tokens in (4_000_000, 10 * 500 * 2048)}
    paper = 4_000_000 * (forward["1.8B"] + forward["14B"]) / interval
    assert paper == pytest.approx(0.0069, rel=0.1)  # the paper's Table 12 has 0.69 %
    assert ours[4_000_000] < 0.0012
    assert ours[10 * 500 * 2048] < 0.0025
