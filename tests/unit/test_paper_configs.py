"""The paper's five pairs and its ablation grids: settings, models, vocabularies and memory, without a network."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from ddk_ds.commands import plan_command as plan
from ddk_ds.config import Config, Model, load_config
from ddk_ds.engine.memory_estimate import MemoryEstimate, estimate_memory
from ddk_ds.engine.memory_estimate import _layer_activations as layer_activations
from ddk_ds.engine.model_files import ModelShape, configured_files, model_shape
from ddk_ds.errors import ConfigError
from ddk_ds.kernels.chunked import HeadInput
from ddk_ds.kernels.linear_kd import check_head

CONFIGS = Path(__file__).parents[2] / "configs"
PAGE = Path(__file__).parents[2] / "docs/paper.md"
RANKS, DEVICE_BYTES, HEAD_ROOM = 16, 80_000_000_000, 0.10


class Pair(NamedTuple):
    """Published values of a pair: parameters in billions, and tokens of the tokenizer that both models share."""

    teacher: float
    student: float
    vocab_size: int
    recipe: str = "paper"


PAIRS = {
    "qwen1.5_14b_to_1.8b": Pair(14.17, 1.84, 151_646),
    "qwen1.5_14b_to_4b": Pair(14.17, 3.95, 151_646),
    "qwen1.5_7b_to_1.8b": Pair(7.72, 1.84, 151_646),
    "llama2_13b_to_tinyllama_1.1b": Pair(13.02, 1.10, 32_000),
    "starcoder_15.5b_to_3b": Pair(15.52, 3.04, 49_152, "stack_v2"),
}
each_pair = pytest.mark.parametrize("name", PAIRS)

# The key in which an ablation's variants differ, and its values in the paper.
GRIDS: dict[str, tuple[str, list[Any]]] = {
    "gamma": ("loss.gamma", [0, 0.1, 0.2, 0.3, 0.5]),
    "temperature": ("loss.temperature", [0.1, 0.2, 0.5, 1, 2]),
    "interval": ("mixture.interval_steps", [50, 100, 500, 1000, 1500, 2000]),
    "sampling": ("mixture.controller", ["ddk", "ddk_no_smoothing", "equal"]),
    "tokens": ("stop.steps", [9537, 19073, 28610, 38147, 57220]),
}


@cache
def config_of(name: str) -> Config:
    return load_config(CONFIGS / "paper" / f"{name}.yaml")


@cache
def shape_of(hub_name: str) -> ModelShape:
    """Return the shape of a model, which is built once on the meta device."""
    return model_shape(configured_files(CONFIGS / "models" / f"{Path(hub_name).name}.json"))


def shapes_of(config: Config) -> tuple[ModelShape, ModelShape]:
    """Return the shapes of the student and of the teacher."""
    assert config.teacher is not None
    return shape_of(config.student.path), shape_of(config.teacher.path)


def estimate_of(name: str) -> MemoryEstimate:
    student, teacher = shapes_of(config_of(name))
    rows = student.head // student.hidden  # the preflight's count, which is never below the tokenizer's
    return estimate_memory(config_of(name), student, teacher, rows, RANKS)


def value_at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def test_every_file_is_known() -> None:
    assert {path.stem for path in (CONFIGS / "paper").glob("*.yaml")} == set(PAIRS)
    assert {path.stem for path in (CONFIGS / "ablations").glob("*.yaml")} == set(GRIDS)


@each_pair
def test_the_settings_are_the_papers(name: str) -> None:
    config = config_of(name)
    assert config.method == "ddk"
    expected = {
        "mixture.controller": "ddk",
        "mixture.alpha": 0.5,
        "mixture.interval_steps": 1000,
        "mixture.ratio_cap": None,
        "mixture.initial_floor": 0.0,
        "mixture.exhaustion": "cycle",
        "loss.divergence": "forward_kl",
        "loss.gamma": 0.2,
        "loss.temperature": 1.0,
        "optimizer.learning_rate": 3e-5,
        "optimizer.min_learning_rate": 3e-6,
        "optimizer.warmup_steps": 1000,
        "data.validation_samples": 500,
        "data.sequence_length": 2048,
        "train.precision": "bf16",
    }
    assert {key: value_at(config, key) for key in expected} == expected


@each_pair
def test_the_tokens_are_the_papers(name: str) -> None:
    config = config_of(name)
    step_tokens = config.train.global_batch_samples * config.data.sequence_length
    assert step_tokens == pytest.approx(0.5e6, rel=0.05)
    assert config.stop.steps is not None
    assert config.stop.steps * step_tokens == pytest.approx(15e9, rel=0.01)
    assert config.micro_batches(RANKS) * config.train.micro_batch_samples * RANKS == 256


@each_pair
def test_the_domains_are_the_recipes(name: str) -> None:
    recipe = yaml.safe_load((CONFIGS / "data" / f"{PAIRS[name].recipe}.yaml").read_text())
    domains = config_of(name).data.domains
    assert domains is not None
    assert set(domains) == set(recipe["domains"])
    assert len(domains) == (4 if PAIRS[name].recipe == "stack_v2" else 10)


@each_pair
def test_parameters(name: str) -> None:
    student, teacher = shapes_of(config_of(name))
    assert student.parameters == pytest.approx(PAIRS[name].student * 1e9, rel=0.005)
    assert teacher.parameters == pytest.approx(PAIRS[name].teacher * 1e9, rel=0.005)


@each_pair
def test_positions_reach(name: str) -> None:
    config = config_of(name)
    assert config.teacher is not None
    for model in (config.student, config.teacher):
        values = json.loads((CONFIGS / "models" / f"{Path(model.path).name}.json").read_text())
        assert values.get("max_position_embeddings", values.get("n_positions")) >= config.data.sequence_length


@each_pair
def test_the_loss_takes_both_heads_cut_to_the_tokenizer(name: str) -> None:
    vocab_size = PAIRS[name].vocab_size
    shapes = shapes_of(config_of(name))
    for shape in shapes:
        rows = shape.head // shape.hidden
        hidden, weight = (torch.empty(n, shape.hidden, dtype=torch.bfloat16, device="meta") for n in (4, rows))
        check_head("", HeadInput(hidden, weight), vocab_size)
        with pytest.raises(ConfigError, match="vocab_size"):
            check_head("", HeadInput(hidden, weight), rows + 1)


def test_the_14b_head_is_longer_than_its_students() -> None:
    student, teacher = shapes_of(config_of("qwen1.5_14b_to_1.8b"))
    assert (teacher.head // teacher.hidden, student.head // student.hidden) == (152_064, 151_936)


@each_pair
def test_memory_leaves_head_room(name: str) -> None:
    assert estimate_of(name).device_bytes <= (1 - HEAD_ROOM) * DEVICE_BYTES


def test_the_page_shows_the_estimate() -> None:
    lines = PAGE.read_text().splitlines()
    header = next(line for line in lines if line.startswith("| GB a rank |"))
    columns = [cell.strip() for cell in header.strip("|").split("|")][1:]
    assert columns == list(PAIRS)
    rows = {cells[1].strip(): cells[2:-1] for line in lines if len(cells := line.split("|")) == len(PAIRS) + 3}
    for column, name in enumerate(PAIRS):
        estimate = estimate_of(name)
        for part, taken in {**estimate.parts, "device, at its height": estimate.device_bytes}.items():
            assert float(rows[part][column]) == pytest.approx(taken / 1e9, abs=0.006), f"{name}, {part}"


def test_the_pages_command_makes_the_estimate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """plan.py shows some parts in two: their sums are compared, and the height."""
    shown = re.search(r"ddk plan --config \$pair (--nodes .*)", PAGE.read_text())
    assert shown is not None
    name, out = "llama2_13b_to_tinyllama_1.1b", tmp_path / "plan.json"
    monkeypatch.chdir(CONFIGS.parent)
    assert plan.main(["--config", f"configs/paper/{name}.yaml", *shown[1].split(), "--json", str(out)]) == 0
    found, estimate = json.loads(out.read_text()), estimate_of(name)
    assert found["device_bytes"] == estimate.device_bytes
    assert sum(found["memory_bytes"].values()) == sum(estimate.parts.values())
    once = found["memory_bytes"].keys() & estimate.parts.keys()
    assert len(once) >= 8 and all(found["memory_bytes"][part] == estimate.parts[part] for part in once)


@pytest.mark.parametrize("grid", GRIDS)
def test_every_variant_of_an_ablation_is_the_papers(grid: str) -> None:
    key, expected = GRIDS[grid]
    values = yaml.safe_load((CONFIGS / "ablations" / f"{grid}.yaml").read_text())
    assert list(values) == ["variants"]
    base = CONFIGS / "paper/qwen1.5_14b_to_1.8b.yaml"
    variants = {label: load_config(base, overrides) for label, overrides in values["variants"].items()}
    assert [value_at(config, key) for config in variants.values()] == expected
    for label, config in variants.items():
        if grid == "sampling":
            assert label == config.method
        elif grid == "tokens":
            assert config.stop.steps is not None
            assert config.stop.steps * 256 * 2048 == pytest.approx(float(label) * 1e9, rel=1e-4)
        else:
            assert float(label) == value_at(config, key)
    # One of them is the base itself, so the others differ from it only in this key.
    assert sum(config == config_of("qwen1.5_14b_to_1.8b") for config in variants.values()) == 1


def saved_bytes(values: dict[str, Any], layers: int, tokens: int) -> int:
    """Return the bytes that autograd keeps after a forward pass of the backbone, without the parameters."""
    key = "n_layer" if "n_layer" in values else "num_hidden_layers"
    hf_config = AutoConfig.for_model(**values | {key: layers})
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa", dtype=torch.bfloat16).train()
    parameters = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# The estimate must not be too low; it counts norms in float32, which LayerNorm does not keep, and keys and values for
# each head, which transformers 5 keeps for each group of heads.
@pytest.mark.parametrize(
    ("model", "most"),
    [("Qwen1.5-1.8B", 1.02), ("TinyLlama-1.1B-intermediate-step-1431k-3T", 1.1), ("starcoderbase-3b", 1.3)],
)
def test_activations_of_a_layer(model: str, most: float, tmp_path: Path) -> None:
    values = json.loads((CONFIGS / "models" / f"{model}.json").read_text()) | {"vocab_size": 64}
    if "n_embd" in values:  # narrower with the same ratios, and without dropout, for which a CPU stores the scores
        values |= {"n_embd": 256, "n_head": 2, "n_inner": 1024, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    else:
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            values[key] //= 2
    (tmp_path / "model.json").write_text(json.dumps(values))
    shape = model_shape(configured_files(tmp_path / "model.json"))
    tokens = 128
    measured = saved_bytes(values, 2, tokens) - saved_bytes(values, 1, tokens)
    estimated = layer_activations(Model(path="-"), shape, tokens, tokens, 2)
    assert 0.98 <= estimated / measured <= most


def test_tied_heads_count_once_where_the_published_configuration_is_silent(tmp_path: Path) -> None:
    values = json.loads((CONFIGS / "models/starcoderbase-3b.json").read_text())
    del values["tie_word_embeddings"]
    (tmp_path / "model.json").write_text(json.dumps(values))
    shape = model_shape(configured_files(tmp_path / "model.json"))
    assert (shape.parameters, shape.head) == (shape_of("starcoderbase-3b").parameters, 49_152 * 2816)
    assert (shape.key_value, shape.gated) == (128, False)
