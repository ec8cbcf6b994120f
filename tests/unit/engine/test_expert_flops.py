"""Of a mixture of experts only the experts that a token is sent to count: torch's own count, and published figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from ddk_ds.engine.config_sizes import SIZE_KEYS, config_size
from ddk_ds.engine.flops import active_weights, model_flops
from ddk_ds.engine.model_files import ModelFiles, configured_files, model_shape

CONFIGS = Path(__file__).parents[3] / "configs/models"
WIDTH: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 500}
SMALL: dict[str, Any] = {**WIDTH, "num_key_value_heads": 2, "intermediate_size": 256, "num_experts_per_tok": 2}
DEEPSEEK = {**SMALL, "n_routed_experts": 8, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1}
DEEPSEEK |= {"topk_group": 1, "num_key_value_heads": 4}
MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
QWEN = {**SMALL, "num_experts": 8, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**QWEN, "head_dim": 16, "mlp_only_layers": [0]},
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 2},
    "mixtral": {**SMALL, "num_local_experts": 4},
    "deepseek_v3": {**DEEPSEEK, **MLA, "n_shared_experts": 1},
    "glm4_moe": {**DEEPSEEK, "n_shared_experts": 2, "head_dim": 16},
    "gpt_oss": {**SMALL, "num_local_experts": 8, "head_dim": 16},
    "olmoe": {**SMALL, "num_experts": 8},
    "granitemoe": {**SMALL, "num_local_experts": 8},
    "ernie4_5_moe": {**QWEN, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "num_experts": None},
}
# Billions of parameters by the models' cards, in all and active; Qwen's, Mistral's and DeepSeek's count the embedding.
PUBLISHED = {
    "gpt-oss-20b": (20.9, 3.6, False),
    "mixtral": (46.7, 12.9, True),
    "deepseek_v3": (671.0, 37.0, True),
}
V3 = pytest.param("deepseek_v3", marks=pytest.mark.long("its 45,000 expert modules, under transformers 4.57 20 s"))


def files_of(values: dict[str, Any], folder: Path) -> ModelFiles:
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return configured_files(folder / "config.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_flops_are_torchs(family: str, tmp_path: Path) -> None:
    files = files_of({"model_type": family, **FAMILIES[family]}, tmp_path)
    # The loop over the experts that are chosen: torch's counter does not know the grouped product.
    options = {"experts_implementation": "eager"} if int(transformers.__version__.split(".")[0]) > 4 else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**files.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **options).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 500, (2, 64)), use_cache=False)
    flops = model_flops(files, 64, causal=False)
    assert flops == pytest.approx(counter.get_total_flops() / 128, rel=0.02)
    shape = model_shape(files)
    assert shape.experts_per_token == 2
    assert flops < 2 * shape.parameters, "experts that a token is not sent to are counted"


@pytest.mark.parametrize("name", ["gpt-oss-20b", "mixtral", V3])
def test_active_parameters_are_the_published(name: str, tmp_path: Path) -> None:
    total, active, with_embedding = PUBLISHED[name]
    place = CONFIGS / f"{name}.json"
    if place.is_file():
        files = configured_files(place)
    else:  # transformers' defaults are the published model
        defaults = AutoConfig.for_model(name).to_dict()
        keys = ("intermediate_size", "moe_intermediate_size", "vocab_size", "n_shared_experts", "first_k_dense_replace")
        keys += ("num_key_value_heads", "q_lora_rank", "kv_lora_rank", *MLA)
        keys += tuple(key for names in SIZE_KEYS.values() for key in names)
        files = files_of({"model_type": name, **{key: defaults.get(key) for key in keys}}, tmp_path)
    counted = active_weights({name: tensor.shape for name, tensor in files.tensors.items()}, files.config)
    if with_embedding:
        counted += files.config["vocab_size"] * config_size(files.config, "width")
    assert model_shape(files).parameters / 1e9 == pytest.approx(total, rel=0.005)
    assert counted / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (
            {"num_hidden_layers": 6, "decoder_layers": 12},
            12,
        ),  # BART's number is that of its encoder, which takes no part
        ({"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]}, 4),  # Nemotron-H's
        ({"model_type": "llama"}, 0),
    ],
)
def test_the_number_of_layers(config: dict[str, Any], layers: int) -> None:
    assert config_size(config, "layers") == layers
