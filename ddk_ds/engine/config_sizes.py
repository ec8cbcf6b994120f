"""Sizes of a model by the names that config.json has for them. Pure: no torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SIZE_KEYS = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "width": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
}
"""The keys of config.json that give a size: most architectures use the first, older ones another."""


def config_size(config: Mapping[str, Any], name: str) -> int:
    """Return a size of `SIZE_KEYS` from the content of a config.json; 0 if it is not there."""
    return next((int(config[key]) for key in SIZE_KEYS[name] if config.get(key)), 0)
