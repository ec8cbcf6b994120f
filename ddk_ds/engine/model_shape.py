"""What memory, gathers and buckets depend on of a model: counts of elements, from its config.json and its tensors'
headers. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddk_ds.config import Model
from ddk_ds.config.models import Teacher
from ddk_ds.engine.model_files import ModelFiles, configured_files

COMPUTE_BYTES = {"bf16": 2, "fp32": 4}
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
# What older checkpoints store beside parameters: rotary frequencies and attention masks.
_BUFFERS = re.compile(r"(\.inv_freq|\.masked_bias|\.attn\.bias|\.attention\.bias)$")
_LAYER = re.compile(r"^(.*?\.\d+)\.")
# First matrix of an MLP without a gate (GPT-2 and StarCoder; OPT, Phi; GPT-J; GPT-NeoX, Bloom, Falcon).
_PLAIN_MLP = re.compile(r"\.(c_fc|fc1|fc_in|dense_h_to_4h)\.weight$")
# Architectures whose output head is the embedding where config.json does not say.
_TIED_BY_DEFAULT = ("gpt_bigcode", "gpt2")


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on of a model; counts of elements."""

    tensors: tuple[int, ...]
    """Elements of each parameter, tied ones once."""
    largest_layer: int
    """Elements of the largest layer."""
    head: int
    """Elements of the output head, which is the embedding's where they are tied."""
    layers: int
    hidden: int
    attention: int
    """Width of queries and of the attention's output: heads x their size."""
    key_value: int
    """Width of keys and of values."""
    intermediate: int
    """Width of the MLP that a token goes through; of a mixture of experts: of all experts that it goes to."""
    gated: bool
    """Whether the MLP multiplies two of its products: it then keeps four tensors of that width, otherwise two."""
    heads: int
    matrices: tuple[int, ...] = ()
    """Elements of those of `tensors` that are matrices of the layers."""

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(self.tensors)

    def shard(self, world_size: int) -> int:
        """Elements of one rank's shards: ZeRO-3 pads each tensor to a multiple of the ranks."""
        return sum(math.ceil(tensor / world_size) for tensor in self.tensors)

    def at_rest(self, model: Model, precision: str) -> ModelShape:
        """In elements as ZeRO-3 holds and gathers them: of the compute dtype, two or four weights of 8 bits in one."""
        if not isinstance(model, Teacher) or model.quantize == "none":
            return self
        in_one = COMPUTE_BYTES[precision]
        others = list(self.tensors)
        for matrix in self.matrices:
            others.remove(matrix)
        small = (*others, *(matrix // in_one for matrix in self.matrices))
        return replace(self, tensors=small, largest_layer=self.largest_layer // in_one)


def model_shape(files: ModelFiles) -> ModelShape:
    """The shape of a model from its config.json and its tensors' headers."""
    values = {**files.config, **files.config.get("text_config", {})}
    sizes = {name: math.prod(t.shape) for name, t in files.tensors.items() if not _BUFFERS.search(name)}
    heads = [name for name in sizes if name.endswith(_HEADS)]
    if values.get("tie_word_embeddings", values.get("model_type") in _TIED_BY_DEFAULT):
        for name in heads:
            del sizes[name]
    layers: dict[str, int] = {}
    for name, size in sizes.items():
        if match := _LAYER.match(name):
            layers[match[1]] = layers.get(match[1], 0) + size
    outside = max((size for name, size in sizes.items() if not _LAYER.match(name)), default=0)
    hidden = _first(values, "hidden_size", "n_embd", "d_model")
    num_heads = max(1, _first(values, "num_attention_heads", "n_head"))
    head_size = _first(values, "head_dim") or hidden // num_heads
    experts = _first(values, "num_experts_per_tok") or 1
    intermediate = _first(values, "moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    return ModelShape(
        tensors=tuple(sizes.values()),
        largest_layer=max(layers.values(), default=0),
        head=next((sizes[name] for name in heads if name in sizes), outside),
        layers=_first(values, "num_hidden_layers", "n_layer") or len(layers),
        hidden=hidden,
        attention=num_heads * head_size,
        key_value=(1 if values.get("multi_query") else _first(values, "num_key_value_heads") or num_heads) * head_size,
        intermediate=experts * intermediate,
        gated=not any(_PLAIN_MLP.search(name) for name in sizes),
        heads=num_heads,
        matrices=tuple(
            size for name, size in sizes.items() if _LAYER.match(name) and len(files.tensors[name].shape) == 2
        ),
    )


def configured_shape(config: Path) -> ModelShape:
    """The shape of the model that a Hugging Face configuration (JSON) describes: nothing of it is built in memory."""
    return model_shape(configured_files(config))


def _first(values: Mapping[str, Any], *keys: str) -> int:
    return next((int(values[key]) for key in keys if values.get(key)), 0)
