"""The text model in a wrapper: right values come from transformers' own wrapper, given text alone, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ddk_ds.engine.model_files import model_shape, read_model
from ddk_ds.engine.whole_models import load_model
from ddk_ds.errors import ConfigError
from tests.dist.tiny import save_model

VOCAB = 64
IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))
# Names of the same tensors in checkpoints that are published, and in those that later versions write.
NAMES = {"published": "language_model.model.", "later": "model.language_model."}


def renamed(directory: Path, prefix: str) -> None:
    """Give the text model's tensors another prefix, and the head the one that goes with it."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    text = {"language_model.model.": prefix, "model.language_model.": prefix}
    head = "language_model.lm_head." if prefix == NAMES["published"] else "lm_head."
    changed = {}
    for name, tensor in tensors.items():
        for old, new in (*text.items(), ("language_model.lm_head.", head), ("lm_head.", head)):
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        changed[name] = tensor
    save_file(changed, file, metadata={"format": "pt"})


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("tied", [True, False])
def test_gemma_3_with_vision_is_its_text_model(names: str, tied: bool, tmp_path: Path) -> None:
    save_model(tmp_path, model_type="gemma3", vocab=VOCAB, tied=tied, seed=3)
    expected = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")(IDS).logits
    renamed(tmp_path, NAMES[names])
    files = read_model(tmp_path, "teacher.path")
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**files.config))
    plain.save_pretrained(tmp_path / "plain")
    assert files.config["model_type"] == "gemma3_text"
    assert files.tensors.keys() == read_model(tmp_path / "plain", "plain").tensors.keys()
    assert model_shape(files) == model_shape(read_model(tmp_path / "plain", "plain"))
    assert any("vision" in name for name in files.unused)
    assert files.stored_names == load_file(tmp_path / "model.safetensors").keys()
    torch.testing.assert_close(load_model(tmp_path)(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_text_model_that_transformers_has_only_in_its_wrapper_is_refused(tmp_path: Path) -> None:
    config: dict[str, Any] = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.embed_tokens.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    message = r"teacher.path: .* Qwen2_5_VLForConditionalGeneration wraps a text model \(qwen2_5_vl_text\) that transf"
    with pytest.raises(ConfigError, match=message):
        read_model(tmp_path, "teacher.path")


def test_an_fp8_tensor_of_a_wrapped_text_model_keeps_its_scales(tmp_path: Path) -> None:
    save_model(tmp_path, model_type="gemma3", vocab=VOCAB, tied=True, seed=3)
    renamed(tmp_path, NAMES["published"])
    tensors = load_file(tmp_path / "model.safetensors")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    scale = torch.rand(4, 2) + 0.5  # of 16 x 16 blocks of the (64, 32) weight
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors | {f"{name}_scale_inv": scale}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = read_model(tmp_path, "teacher.path")
    found = files.read("model.layers.0.mlp.up_proj.weight")
    assert files.quantized and "quantization_config" not in files.config
    torch.testing.assert_close(found, tensors[name].float() * torch.kron(scale, torch.ones(16, 16)), rtol=0, atol=0)
