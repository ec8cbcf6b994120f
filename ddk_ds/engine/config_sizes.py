"""Sizes of a model, its experts and factors of its logits, by config.json's names for them. Pure: no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

SIZE_KEYS = {
    "layers": ("decoder_layers", "num_hidden_layers", "n_layer", "num_layers", "n_layers", "layers_block_type"),
    "width": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "experts per token": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "experts_per_token",
        "moe_topk",
        "moe_k",
        "moe_top_k",
        "top_k_experts",
    ),
}
"""The keys of config.json that give a size: most architectures use the first, older ones another."""
_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
_EXPERTS = re.compile(r"\.experts\.")
_ROUTER = re.compile(r"\.(router|gate)\.(\w+\.)?(weight|bias)$")

LOGIT_KEYS = {
    "factor": ("logit_scale", "lm_head_multiplier"),
    "divisor": ("logits_scaling",),
    "softcap": ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
}
"""The keys for what some models do to the products of their head.

Cohere and Falcon-H1 multiply, Granite divides, Gemma, RecurrentGemma and xLSTM apply tanh.
"""


def config_size(config: Mapping[str, Any], name: str) -> int:
    """Return a size of `SIZE_KEYS` from the content of a config.json; 0 if it is not there.

    Of a list with a size for each layer it is the largest; of Nemotron-H's list of its layers' kinds the length.
    """
    values = {**(config.get("ffn_config") or {}), **config}  # DBRX has its experts' sizes in a part of its own
    found = next((values[key] for key in SIZE_KEYS[name] if values.get(key)), 0)
    if isinstance(found, list):
        return len(found) if isinstance(found[0], str) else int(max(found))
    return int(found)


def experts_per_token(config: Mapping[str, Any]) -> int:
    """Return the number of experts that a token is sent to; 0 in a dense model."""
    return config_size(config, "experts per token") if config_size(config, "experts") > 1 else 0


def attention_width(config: Mapping[str, Any]) -> int:
    """Return heads x size of a head; with latent attention (MLA) heads x the mean size of a head's key and value."""
    heads = max(1, config_size(config, "heads"))
    if config.get("qk_nope_head_dim") and config.get("v_head_dim"):
        return int(heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"]) // 2)
    return int(heads * config["head_dim"]) if config.get("head_dim") else config_size(config, "width")


def is_expert(name: str, shape: Sequence[int], config: Mapping[str, Any]) -> bool:
    """Return True if a tensor holds weights of experts of which a token uses some, one expert's or all of them fused.

    A router's weights and those of shared experts do not count: every token uses them.
    """
    experts = config_size(config, "experts")
    fused = len(shape) == 3 and shape[0] == experts
    return experts > 1 and (fused or bool(_EXPERTS.search(name))) and not _ROUTER.search(name)


def is_router(name: str, shape: Sequence[int], config: Mapping[str, Any]) -> bool:
    """Return True if a tensor is the matrix (experts, width) of a router."""
    experts = config_size(config, "experts")
    return experts > 1 and len(shape) == 2 and shape[0] == experts and bool(_ROUTER.search(name))


def mlp_width(config: Mapping[str, Any]) -> int:
    """Return the width of the MLP that a token goes through: of all its experts and shared ones together, or of the
    dense layers if that is larger; 0 if config.json does not say it.
    """
    values = {**(config.get("ffn_config") or {}), **config}
    found = next((values[key] for key in _WIDTHS if values.get(key)), 0)
    plain = int(max(found) if isinstance(found, list) else found)
    chosen = experts_per_token(config)
    if not chosen:
        return plain
    expert = values.get("moe_intermediate_size") or values.get("ffn_hidden_size") or plain
    shared = max((int(values.get(key) or 0) * expert for key in _SHARED_EXPERTS), default=0)
    shared = values.get("shared_expert_intermediate_size") or values.get("shared_intermediate_size") or shared
    return int(max(chosen * expert + shared, plain))


def used_weights(name: str, shape: Sequence[int], config: Mapping[str, Any]) -> float:
    """Return the number of a tensor's weights that a token is multiplied by: of experts those that it is sent to."""
    chosen = experts_per_token(config)
    share = chosen / config_size(config, "experts") if chosen and is_expert(name, shape, config) else 1.0
    return math.prod(shape) * share


def divides_heads(ranks: int, heads: int, kv_heads: int) -> bool:
    """Return True if that many ranks can share attention: each gets whole heads, those of keys repeated if need be."""
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
