"""Quantised checkpoints are read as the numbers that they stand for, or refused by name.

The right numbers are computed in float64 by numpy, and for MXFP4 by transformers' own conversion.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Qwen3MoeConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ddk_ds.engine.model_files import model_shape, read_model
from ddk_ds.engine.whole_models import load_model
from ddk_ds.errors import ConfigError
from tests.quantised_checkpoint import FORMATS, Tensors, compressed, write_fp8, write_quantised

SIZES: dict[str, Any] = {
    **{"vocab_size": 60, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
}


def fp8_model(folder: Path, kind: str, config: Any = None) -> tuple[Path, Tensors]:
    """Write a small model (Llama) with FP8 layers in two files, and return it with the weights that it stands for."""
    config = config or LlamaConfig(**SIZES)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "plain")
    return folder / "quantised", write_fp8(folder / "plain", folder / "quantised", kind)


@pytest.mark.parametrize("kind", FORMATS)
def test_fp8_weights_are_multiplied_by_their_scales(tmp_path: Path, kind: str) -> None:
    quantised, right = fp8_model(tmp_path, kind)
    files = read_model(quantised, "teacher.path")
    assert set(files.tensors) == set(right) and "quantization_config" not in files.config
    for name, weight in right.items():
        assert torch.equal(files.read(name).float(), weight), name
    assert sorted(model_shape(files).tensors) == sorted(model_shape(read_model(tmp_path / "plain", "")).tensors)
    ids = torch.arange(20)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(ids).logits
    torch.testing.assert_close(load_model(quantised)(ids).logits, plain, rtol=0, atol=1e-6)


def test_fp8_experts_are_multiplied_before_transformers_joins_them(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=12, num_experts_per_tok=3, head_dim=10)
    quantised, _ = fp8_model(tmp_path, "blocks", config)
    assert "model.layers.1.mlp.experts.11.up_proj.weight" in read_model(quantised, "teacher.path").tensors
    ids = torch.arange(20)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(ids).logits
    torch.testing.assert_close(load_model(quantised)(ids).logits, plain, rtol=0, atol=1e-6)


def test_mxfp4_experts_are_transformers_own(tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=60, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, rope_scaling=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain/model.safetensors")
    stored = dict(plain)
    for name in [name for name in plain if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, rows = stored.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, width // 32, 16), dtype=torch.uint8)
        scales = torch.randint(110, 125, (experts, rows, width // 32), dtype=torch.uint8)
        stored[name + "_blocks"], stored[name + "_scales"] = blocks, scales
        plain[name] = convert_moe_packed_tensors(blocks, scales).float()
    quantised = tmp_path / "quantised"
    write_quantised(quantised, tmp_path / "plain", stored, {"quant_method": "mxfp4"})
    files = read_model(quantised, "teacher.path")
    assert set(files.tensors) == set(plain)
    for name, weight in plain.items():
        assert files.tensors[name].shape == weight.shape
        assert torch.equal(files.read(name).float(), weight), name
    save_file(plain, tmp_path / "plain/model.safetensors", {"format": "pt"})
    ids = torch.arange(20)[None]
    right = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation="eager")(ids).logits
    torch.testing.assert_close(load_model(quantised)(ids).logits, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised by 'bitsandbytes'"),
        ({"quant_method": "awq"}, "quantised by 'awq'"),
        (compressed("channel", format="int-quantized"), "quantised by 'compressed-tensors'"),
        (compressed("group"), "quantised by 'compressed-tensors'"),
        (compressed("channel", sparsity_config={"format": "sparse-24-bitmask"}), "quantised by 'compressed-tensors'"),
        (None, "stored as F8_E4M3, and its config.json does not say how"),
        ({"quant_method": "fp8", "weight_block_size": [8, 8]}, "has shape"),
        ({"quant_method": "fbgemm_fp8"}, "proj.weight_scale: copy"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, section: dict[str, Any] | None, said: str) -> None:
    quantised, _ = fp8_model(tmp_path, "blocks")
    config = json.loads((quantised / "config.json").read_text()) | {"quantization_config": section}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"^teacher\.path: .*quantised") as error:
        read_model(quantised, "teacher.path")
    assert said in str(error.value) and "\n" not in str(error.value)
