"""Tiny models and configurations for the distributed tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ddk_ds.config import Config, make_config

VOCAB = 205  # the tokenizer's true size; both heads are padded beyond it, by different amounts
_GEMMA3 = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64},
    "qwen2": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64},
    "gpt_neox": {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "rotary_pct": 0.5},
    "gemma2": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": _GEMMA3,
    "gemma3": {  # with vision
        "text_config": _GEMMA3,
        "vision_config": {
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "image_size": 28,
        },
    },
    "cohere": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "logit_scale": 0.25,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "glm4_moe": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    "gpt_bigcode": {"n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 64},
}

_EXPERTS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
_EXPERTS |= {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "pad_token_id": 0}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
# More than ten experts, whose names sorted as text are not in order.
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_EXPERTS, "num_experts": 12, "head_dim": 8},
    "qwen2_moe": {**_EXPERTS, "num_experts": 12, "shared_expert_intermediate_size": 24},
    "mixtral": {**_EXPERTS, "num_local_experts": 12},
    "olmoe": {**_EXPERTS, "num_experts": 12},
    "deepseek_v3": {
        **(_EXPERTS | _LATENT),
        **{"n_routed_experts": 12, "num_key_value_heads": 4, "head_dim": 8, "n_group": 2, "topk_group": 1},
        "first_k_dense_replace": 1,
    },
    "qwen3_next": {
        **_EXPERTS,
        **{"num_experts": 12, "shared_expert_intermediate_size": 24, "head_dim": 8},
        **{"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2},
        **{"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    },
}


def save_model(
    directory: Path, *, model_type: str = "llama", hidden: int = 32, vocab: int, tied: bool, seed: int, **extra: Any
) -> None:
    """Write a random causal LM as safetensors."""
    torch.manual_seed(seed)
    shape = ARCHITECTURES.get(model_type) or MIXTURES.get(model_type, {})
    values = {"vocab_size": vocab, "tie_word_embeddings": tied, "initializer_range": 0.2, **shape}
    size = {"n_embd": hidden} if model_type == "gpt_bigcode" else {"hidden_size": hidden}
    if "text_config" in shape:
        text = {**shape["text_config"], **size, "vocab_size": vocab, "tie_word_embeddings": tied}
        values, size = {**shape, "text_config": text, "tie_word_embeddings": tied, "initializer_range": 0.2}, {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**values, **size, **extra}))
    for name, buffer in model.named_buffers():  # a router's correction, which is zero at first
        if name in model.state_dict():
            buffer.add_(torch.rand_like(buffer))
    model.save_pretrained(directory)


def tiny_config(folder: Path, **sections: Any) -> Config:
    """A valid run configuration over `folder`/student and `folder`/teacher; sections are merged in."""
    values: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher")},
        "data": {"path": str(folder / "data"), "sequence_length": 24, "validation_samples": 4},
        "optimizer": {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_steps": 1},
        "train": {"global_batch_samples": 8, "micro_batch_samples": 1, "precision": "fp32"},
        "stop": {"steps": 6},
        # Tiny tensors would all stay gathered, and the gathers would go untested.
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return make_config(values, "tiny")
