"""The configurations of today's pairs: they load, their models are the published ones, and their plans fit."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ddk_ds.commands import distill_rank, plan_command, prepare_command
from ddk_ds.config import load_config
from tools.bench.step_setting import save_byte_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"


class Pair(NamedTuple):
    """Published billions of parameters, and the rows of both heads."""

    teacher: float
    student: float
    active: float
    """Of the teacher's parameters those that a token is multiplied by: without the embedding, which is looked up."""
    rows: tuple[int, int]


# Qwen's and Meta's cards; KerasHub's presets count Gemma's text models exactly. Of gpt-oss by hand: 12 layers with 8
# experts of 24.892 M, 26.579 M besides, and embedding and head.
PAIRS = {
    "qwen3_30b_a3b_to_1.7b": Pair(30.5, 1.72, 3.35 - 0.31, (151_936, 151_936)),
    "qwen3_32b_to_4b": Pair(32.8, 4.02, 32.8 - 0.78, (151_936, 151_936)),
    "gpt_oss_20b_to_pruned": Pair(20.9, (12 * (8 * 24.892 + 26.579) + 2 * 579.13) / 1000, 3.61, (201_088, 201_088)),
    "llama3.1_8b_to_3.2_1b": Pair(8.03, 1.236, 8.03 - 0.53, (128_256, 128_256)),
    "gemma3_12b_to_1b": Pair(11.766, 0.99989, 11.766, (262_208, 262_144)),
}


def test_every_file_is_known() -> None:
    assert {path.stem for path in (CONFIGS / "pairs").glob("*.yaml")} == set(PAIRS)


ALIKE = pytest.mark.long("a dense pair as others, 6 s; the other three differ most")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=ALIKE if "32b" in name or "llama" in name else ()) for name in PAIRS]
)
def test_the_plan(name: str, tmp_path: Path) -> None:
    pair, file = PAIRS[name], CONFIGS / "pairs" / f"{name}.yaml"
    config = load_config(file)
    assert config.teacher is not None
    cluster = ["--nodes", "2", "--gpus-per-node", "8", "--gpu", "h100-80g"]
    assert plan_command.main(["--config", str(file), *cluster, "--json", str(tmp_path / "plan.json")]) == 0
    plan: dict[str, Any] = json.loads((tmp_path / "plan.json").read_text())
    assert plan["parameters"]["teacher"] / 1e9 == pytest.approx(pair.teacher, rel=0.005)
    assert plan["parameters"]["student"] / 1e9 == pytest.approx(pair.student, rel=0.005)
    assert plan["fits"] and plan["tokens"] == pytest.approx(10e9, rel=0.01)
    assert plan["better_place_of_the_teacher"] is None, "the configuration has the place that the planner advises"
    shapes = [
        json.loads((CONFIGS / f"models/{Path(m.path).name}.json").read_text()) for m in (config.teacher, config.student)
    ]
    assert tuple(shape["vocab_size"] for shape in shapes) == pair.rows
    assert plan["active_weights"]["teacher"] / 1e9 == pytest.approx(pair.active, rel=0.01)


def test_a_sharded_mixture_does_not_pay_on_a_slow_network(tmp_path: Path) -> None:
    """By hand: a pass gathers 20.91 B weights of 2 bytes, 41.8 GB, and 15/16 of them cross 8 adapters of 3 GB/s."""
    file, out = CONFIGS / "pairs/gpt_oss_20b_to_pruned.yaml", tmp_path / "plan.json"
    cluster = ["--nodes", "2", "--gpus-per-node", "8", "--gpu", "h100-80g", "--link-gb-s", "3"]
    changes = ["teacher.shard_within=world", "train.global_batch_samples=32"]
    assert plan_command.main(["--config", str(file), *cluster, "--json", str(out), *changes]) == 0
    plan = json.loads(out.read_text())
    gathers, place = plan["teacher_gathers"], plan["better_place_of_the_teacher"]
    assert gathers["num_bytes"] == pytest.approx(41.8e9, rel=0.005)
    assert gathers["seconds"] == pytest.approx(41.8e9 * 15 / 16 / (8 * 3e9 * 0.8), rel=0.01)
    tokens = 2 * 4096
    attention = 4 * 24 * 64 * 64 * 4096
    # Small kernels: 68 bytes an element of the width, 16 of queries and keys, 4 of four experts' MLPs.
    small = 24 * (68 * 2880 + 16 * (64 + 8) * 64 + 4 * 4 * 2880) / (0.8 * 3.35e12)
    compute = tokens * ((2 * 3.61e9 + attention) / (0.42 * 989e12) + small)
    assert gathers["compute_s"] == pytest.approx(compute, rel=0.01)
    assert place["shard_within"] == "node" and place["fits"]
    assert place["tokens_per_s_per_gpu"] * 16 > 1.2 * plan["simulated_step"]["tokens_per_s"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a tokenizer of bytes, and shards of samples of 4,096 tokens."""
    folder = tmp_path_factory.mktemp("pairs")
    save_byte_tokenizer(300, folder / "tokenizer")
    recipe = folder / "recipe.yaml"
    recipe.write_text("domains: {python: {sources: ['stdlib:json/*.py', 'stdlib:email/*.py']}}\n")
    arguments = ["--recipe", str(recipe), "--tokenizer", str(folder / "tokenizer"), "--out", str(folder / "shards")]
    assert prepare_command.main([*arguments, "--sequence-length", "4096", "--validation-samples", "4"]) == 0
    return folder


def write_files(config: Path, tokenizer: Path, directory: Path) -> None:
    """Write a model directory whose tensors have the names and shapes of the model, in a file full of holes."""
    shutil.copytree(tokenizer, directory)
    values = json.loads(config.read_text())
    auto = AutoModelForImageTextToText if "text_config" in values else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.for_model(**values), dtype=torch.bfloat16)
    (directory / "config.json").write_text(json.dumps({**values, "architectures": [type(model).__name__]}))
    model.tie_weights()
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in model.named_parameters():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.long("the whole shapes of ten models, a minute")
@pytest.mark.parametrize("name", PAIRS)
def test_the_dry_run(name: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = CONFIGS / "pairs" / f"{name}.yaml"
    config = load_config(file)
    assert config.teacher is not None
    for role, model in (("teacher", config.teacher), ("student", config.student)):
        write_files(CONFIGS / f"models/{Path(model.path).name}.json", prepared / "tokenizer", tmp_path / role)
    paths = [f"{role}.path={tmp_path / role}" for role in ("student", "teacher")]
    paths += [f"data.path={prepared / 'shards'}", "data.validation_samples=4", f"output_dir={tmp_path}"]
    assert distill_rank.main(["--config", str(file), "--dry-run", "--ranks", "16", *paths]) == 0
    shown = capsys.readouterr().out
    assert "every check passed" in shown and "vocabulary 300;" in shown and "16 ranks x" in shown
