"""transformers' models without weights, which show a model's names, shapes and parts before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ddk_ds.errors import ConfigError

# Its place differs between transformers 4 and 5; mypy sees one of the two versions.
try:
    from transformers.initialization import no_init_weights  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    from transformers.modeling_utils import no_init_weights  # type: ignore[attr-defined,no-redef,unused-ignore]

__all__ = ["backbone_of", "hf_config_of", "meta_model", "no_init_weights", "without_memory"]


def hf_config_of(values: dict[str, Any]) -> Any:
    """Return transformers' configuration for the content of a config.json of a model that transformers knows.

    transformers 5 writes infinity, which JSON lacks, as {"__float__": "Infinity"}.
    """

    def number(part: dict[str, Any]) -> Any:
        return float(part["__float__"]) if part.keys() == {"__float__"} else part

    return AutoConfig.for_model(**json.loads(json.dumps(values), object_hook=number))


def meta_model(hf_config: Any, *, trusted: bool = False) -> Any:
    """Build a transformers model whose tensors have shapes but no memory, with tied weights.

    `trusted` permits Python code of the model's own directory.
    """
    return without_memory(lambda: AutoModelForCausalLM.from_config(hf_config, trust_remote_code=trusted))


def without_memory(build: Callable[[], Any]) -> Any:
    """Return the model that `build` makes, on the meta device, with tied weights."""
    with no_init_weights():
        try:
            with torch.device("meta"):
                model = build()
        except NotImplementedError:  # Apertus reads constants while it is built, and a meta tensor has no numbers
            with FakeTensorMode(allow_non_fake_inputs=True):
                model = build()
    model.tie_weights()
    return model


def backbone_of(model: Any) -> nn.Module:
    """Return a transformers model without its output head. Raises ConfigError if it has no such part."""
    backbone: Any = model.base_model
    if backbone is model:  # the prefix of Gemma 3's text model is the name of a part that it does not have
        backbone = model.get_decoder()
    inner = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    if backbone is model and len(inner) == 1:  # nor does transformers 5 find that of Llama 4's
        [backbone] = inner
    if backbone is model:
        raise ConfigError(f"{type(model).__name__} has no backbone apart from its head: choose another model")
    assert isinstance(backbone, nn.Module)
    return backbone
