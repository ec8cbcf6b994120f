"""Methods by name: what each sets and needs, and that other rooms know no name."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ddk_ds.config import METHODS, load_config, make_config, to_yaml
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


@pytest.mark.parametrize(
    ("method", "controller", "divergence"),
    [
        ("kd", "by_size", "forward_kl"),
        ("ddk", "ddk", "forward_kl"),
        ("ddk_no_smoothing", "ddk_no_smoothing", "forward_kl"),
        ("ddk_equal", "equal", "forward_kl"),
        ("minillm", "by_size", "reverse_kl"),
        ("ted_filters", "by_size", "forward_kl"),
        ("doremi_proxy", "equal", "forward_kl"),
    ],
)
def test_a_method_sets_what_the_configuration_does_not(method: str, controller: str, divergence: str) -> None:
    config = config_of(method=method)
    assert (config.mixture.controller, config.loss.divergence) == (controller, divergence)
    own = config_of(method=method, mixture={"controller": "equal"}, loss={"divergence": "jensen_shannon"})
    assert (own.mixture.controller, own.loss.divergence) == ("equal", "jensen_shannon")


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
                    assert imported <= {"IGNORE_INDEX", "Batch", "Method", "next_token_labels"}, f"{name}: {imported}"
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
        shapes = [tuple(parameter.shape) for parameter in model.parameters()]
        forward[name] = count_forward_flops(shapes, values.to_dict(), 2048)
    interval = 1000 * 256 * 2048 * training_flops(config_of(method="kd"), forward["1.8B"], forward["14B"])
    ours = {tokens: tokens * forward["1.8B"] / interval for tokens in (4_000_000, 10 * 500 * 2048)}
    paper = 4_000_000 * (forward["1.8B"] + forward["14B"]) / interval
    assert paper == pytest.approx(0.0069, rel=0.1)  # the paper's Table 12 has 0.69 %
    assert ours[4_000_000] < 0.0012
    assert ours[10 * 500 * 2048] < 0.0025
