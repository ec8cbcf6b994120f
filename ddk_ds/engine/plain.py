"""A causal LM as plain transformers loads it: whole, on the CPU, for tools that look at its weights or run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from ddk_ds.errors import ConfigError


def load_model(directory: Path, dtype: torch.dtype | Literal["auto"] = torch.float32) -> Any:
    """The causal LM on the CPU; "auto" keeps the dtype of its files.

    Raises ConfigError where transformers cannot build or fill it.
    """
    only = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True, **only)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{directory} cannot be loaded: {reason}") from error
    model, info = loaded
    if info["missing_keys"]:
        raise ConfigError(f"{directory}: its weights lack {min(info['missing_keys'])}; is config.json that of these?")
    return model.eval().requires_grad_(False)
