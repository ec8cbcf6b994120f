"""The kernel of a model's attention computes all that the model computes: the right value is plain transformers' eager.

Eager is each model's own code for its attention.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ddk_ds.config.sections import Student, Teacher
from ddk_ds.engine.attention import best_kernel, check_apart, choose_attention
from ddk_ds.engine.attention_masks import use_own_masks
from ddk_ds.engine.model_files import configured_files, model_shape
from ddk_ds.engine.whole_models import load_model
from ddk_ds.errors import ConfigError
from tests.dist.tiny import ARCHITECTURES, save_model
from tools.bench.model_families import small_config

SINKS = {"num_hidden_layers": 2, "num_local_experts": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SINKS |= {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "vocab_size": 64}


def config_of(kind: str, **values: Any) -> dict[str, Any]:
    return {"model_type": kind, **{"vocab_size": 50, "hidden_size": 32, **ARCHITECTURES.get(kind, {}), **values}}


@pytest.mark.parametrize(
    ("config", "kernel"),
    [
        (config_of("llama"), "sdpa"),
        (config_of("qwen2"), "sdpa"),
        (config_of("gpt_neox"), "sdpa"),
        (config_of("gemma3_text"), "sdpa"),
        (config_of("gemma2"), "eager"),
        (config_of("gemma2", attn_logit_softcapping=50.0), "eager"),
        (config_of("gemma2", attn_logit_softcapping=None), "sdpa" if Gemma2ForCausalLM._supports_sdpa else "eager"),
        (config_of("gpt_oss", **SINKS), "eager"),  # sinks
        (config_of("mixtral", **SINKS), "sdpa"),  # a mixture of experts, whose routing cannot be run without values
        ({"model_type": "bloom", "vocab_size": 50}, "eager"),  # transformers has no sdpa for it
    ],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)
def test_the_best_kernel(config: dict[str, Any], kernel: str) -> None:
    assert best_kernel(config) == kernel
    assert choose_attention(config, Path(), "teacher", Teacher(path="x")).kernel == kernel


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    # As EmbeddingGemma: with it a label is among what the model sees.
    config = config_of("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ConfigError, match="cannot be distilled: its tokens see later ones"):
        choose_attention(config, Path(), "teacher", Teacher(path="x"))


@pytest.mark.skipif("deepseek_v4" not in CONFIG_MAPPING, reason="transformers 4 has neither")
def test_deepseeks_sparse_attention_needs_a_mask() -> None:
    config = small_config("deepseek_v32")
    ids = torch.zeros(1, 16, dtype=torch.long)
    AutoModelForCausalLM.from_config(config, attn_implementation="eager")(ids, use_cache=False)
    use_own_masks()
    with pytest.raises(TypeError):
        AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")(ids, use_cache=False)
    assert choose_attention(config.to_dict(), Path(), "teacher", Teacher(path="x")).kernel == "eager"
    with pytest.raises(ConfigError, match=r"needs a mask, and has none with sdpa: set .* to auto or eager"):
        choose_attention(config.to_dict(), Path(), "teacher", Teacher(path="x", attn_implementation="sdpa"))
    # Its parts are converted while they are made, which tensors without memory cannot be.
    assert choose_attention(small_config("deepseek_v4").to_dict(), Path(), "teacher", None).kernel == "eager"


def test_a_model_that_carries_a_state_or_takes_no_positions_keeps_no_documents_apart() -> None:
    for kind, why in (("mamba", "carries a state from token to token"), ("qwen3_next", "carries a state")):
        with pytest.raises(ConfigError, match=rf"{kind}\) {why}.*: set data.documents to joined"):
            check_apart(small_config(kind).to_dict(), Path(), "teacher", Teacher(path="x"))
    for kind in ("llama", "gemma3_text", "gpt2"):
        check_apart(small_config(kind).to_dict(), Path(), "teacher", Teacher(path="x"))


def test_a_named_kernel_that_leaves_something_out_is_refused() -> None:
    gemma, gpt_oss = config_of("gemma2"), config_of("gpt_oss", **SINKS)
    for kernel in ("eager", "flash_attention_2"):  # flash attention has soft caps
        section = Student(path="x", attn_implementation=kernel)  # type: ignore[arg-type]
        assert choose_attention(gemma, Path(), "student", section).kernel == kernel
    for config, kernel in ((gemma, "sdpa"), (gpt_oss, "sdpa"), (gpt_oss, "flash_attention_2")):
        section = Student(path="x", attn_implementation=kernel)  # type: ignore[arg-type]
        message = rf"student.attn_implementation is {kernel}, but {kernel} leaves out .*: set .* to auto or eager"
        with pytest.raises(ConfigError, match=message):
            choose_attention(config, Path(), "student", section)


def test_what_is_no_language_model_is_refused_before_it_is_loaded() -> None:
    with pytest.raises(ConfigError, match="teacher: m cannot be built: "):
        choose_attention({"model_type": "vit"}, Path("m"), "teacher")


def test_a_layer_between_backbone_and_head_is_refused_before_weights_are_loaded() -> None:
    modernbert = config_of("modernbert-decoder", num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    with pytest.raises(ConfigError, match="teacher: m: ModernBertDecoderForCausalLM cannot be distilled: it computes"):
        choose_attention({**modernbert, "pad_token_id": 0}, Path("m"), "teacher")


def test_a_model_that_keeps_a_pass_for_the_next_one_is_no_student() -> None:
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "lru_width": 32, "head_dim": 8}
    config = config_of("recurrent_gemma", block_types=["recurrent", "attention"], **shape)
    choose_attention(config, Path("m"), "teacher", Teacher(path="m"))
    message = (
        r"student: m: RecurrentGemmaForCausalLM cannot be trained, since RecurrentGemmaRglru.recurrent_states keeps"
    )
    with pytest.raises(ConfigError, match=message):
        choose_attention(config, Path("m"), "student", Student(path="m"))


def test_a_whole_model_is_loaded_with_its_soft_cap(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(tmp_path / "gemma2", model_type="gemma2", vocab=50, tied=True, seed=3)
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(5))
    plain = {
        kernel: AutoModelForCausalLM.from_pretrained(tmp_path / "gemma2", attn_implementation=kernel)(ids).logits
        for kernel in (("eager", "sdpa") if Gemma2ForCausalLM._supports_sdpa else ("eager",))
    }
    with caplog.at_level(logging.WARNING):
        ours = load_model(tmp_path / "gemma2")(ids).logits
    if "sdpa" in plain:  # transformers 5 refuses it
        assert (plain["eager"] - plain["sdpa"]).abs().max() > 0.01, "the cap has no effect"
    torch.testing.assert_close(ours, plain["eager"])
    assert "attention is computed by eager: sdpa leaves out softcap" in caplog.text


def test_memory_is_estimated_for_the_kernel_that_is_used(tmp_path: Path) -> None:
    kernels = {}
    for kind in ("llama", "gemma2"):
        file = tmp_path / f"{kind}.json"
        file.write_text(json.dumps(config_of(kind)))
        kernels[kind] = model_shape(configured_files(file)).best_kernel
    assert kernels == {"llama": "sdpa", "gemma2": "eager"}


def test_the_trace_without_a_mask_ends_where_all_kinds_of_attention_have_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here at the first layer. A model of 48 layers takes seconds for each trace."""
    ran = []
    forward = LlamaDecoderLayer.forward

    def counted(self: LlamaDecoderLayer, *arguments: Any, **options: Any) -> Any:
        ran.append(self)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 50}
    config = {"model_type": "llama", "num_hidden_layers": 7, **shape}
    assert choose_attention(config, Path(), "teacher", Teacher(path="x")).kernel == "sdpa"
    assert len(ran) == 7 + 1
