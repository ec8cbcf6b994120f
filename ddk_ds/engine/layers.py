"""A backbone's layers: where they are, how they are computed, several micro-batches through each before the next.

The causal mask that packed samples need no tensor for.

A sample is one run of tokens at positions 0, 1, 2, ...: attention is plainly causal. transformers, called without a
mask, suspects sequences packed with positions that begin anew, and makes a (B, 1, L, L) mask that rules them out. With
a mask torch's flash kernel cannot serve, and the whole square of scores is computed instead of half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ddk_ds.config import Model
from ddk_ds.errors import ConfigError

_aten = torch.ops.aten
# What takes most of a layer's time: matrix products, and attention in torch's kernels for CUDA and CPUs.
_KEPT = {
    packet.default
    for packet in (
        _aten.mm,
        _aten.addmm,
        _aten.bmm,
        _aten._scaled_dot_product_flash_attention,
        _aten._scaled_dot_product_efficient_attention,
        _aten._scaled_dot_product_cudnn_attention,
        _aten._scaled_dot_product_flash_attention_for_cpu,
    )
}


def prepare_layers(backbone: nn.Module, depth: int, section: Model) -> None:
    """How the backbone's layers are gathered and computed, by the model's section of the configuration.

    Before DeepSpeed takes the model. Raises ConfigError where that is not possible.
    """
    if not section.whole_layers:
        return
    layers = layers_of(backbone, depth)
    deepspeed.utils.set_z3_leaf_modules(backbone, list({type(layer) for layer in layers}))
    if section.compile_layers:
        for layer in layers:
            # Within the hooks that gather the layer.
            layer.forward = torch.compile(layer.forward)


def checkpoint_layers(model: Any, how: bool | str) -> None:
    """Have a transformers model compute its layers' activations again in the backward pass, by `gradient_checkpointing`
    of section `student`."""
    if not how:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _keep_products(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def layers_of(backbone: nn.Module, depth: int) -> nn.ModuleList:
    """The backbone's list of `depth` layers. Raises ConfigError where it has none."""
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ConfigError(
        f"{type(backbone).__name__} has no list of {depth} layers, which ted, several micro-batches per pass and "
        "whole_layers need: set whole_layers to false"
    )


class LayerByLayer:
    """Takes several micro-batches through a backbone in one pass, each layer computing one after the other.

    A layer's weights are gathered once for all of them, its activations are those of one micro-batch, and the results
    are to the bit those of a pass for each: a product of all rows at once might be summed in another order.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._parts = 1
        for layer in layers:
            layer.forward = self._in_parts(layer.forward)

    @contextmanager
    def parts(self, count: int) -> Iterator[None]:
        """Around a pass of `count` micro-batches of one shape, joined on the first axis."""
        self._parts = count
        try:
            yield
        finally:
            self._parts = 1

    def _in_parts(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if self._parts == 1:
                return forward(hidden, *arguments, **options)
            rows, count = len(hidden), self._parts
            outputs = []
            for place in range(count):
                part = slice(place * rows // count, (place + 1) * rows // count)
                ours = _rows((arguments, options), rows, part)
                outputs.append(forward(hidden[part], *ours[0], **ours[1]))
            if isinstance(outputs[0], torch.Tensor):
                return torch.cat(outputs)
            return (torch.cat([output[0] for output in outputs]), *outputs[0][1:])

        return run


def _rows(value: Any, rows: int, part: slice) -> Any:
    """The micro-batch's part of everything that has all micro-batches' samples on its first axis."""
    if isinstance(value, torch.Tensor):
        return value[part] if value.dim() > 1 and len(value) == rows else value
    if isinstance(value, dict):
        return {key: _rows(item, rows, part) for key, item in value.items()}
    return type(value)(_rows(item, rows, part) for item in value) if isinstance(value, tuple | list) else value


_KEY = "sdpa"
_with_tensor = ALL_MASK_ATTENTION_FUNCTIONS[_KEY]


def _mask(*arguments: Any, **given: Any) -> Any:
    """None, which is sdpa's own causal mask, where no token is padding, cached or outside a window."""
    queries = given["q_length"] if "q_length" in given else len(given["cache_position"])
    window = given.get("local_size")
    plain = (
        given.get("attention_mask") is None
        and queries == given["kv_length"]
        and (window is None or given["kv_length"] < window)
        and not getattr(given.get("config"), "use_bidirectional_attention", False)
    )
    return None if plain else _with_tensor(*arguments, **given)


def use_causal_kernels() -> None:
    """From here on models of this process whose attention is sdpa get a mask only where they need one."""
    ALL_MASK_ATTENTION_FUNCTIONS[_KEY] = _mask
