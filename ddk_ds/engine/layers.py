"""A backbone's decoder layers: finding them, gathering and checkpointing them, several micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ddk_ds.config import Model
from ddk_ds.config.sections import Student
from ddk_ds.engine.compiling import compile_layers
from ddk_ds.engine.config_sizes import experts_per_token
from ddk_ds.engine.document_attention import documents_in, same_documents
from ddk_ds.errors import ConfigError

_aten = torch.ops.aten
# Operators that take most of a layer's time: matrix products, and attention in torch's kernels for CUDA and CPUs.
_KEPT_OPERATORS = {
    packet.default
    for packet in (
        _aten.mm,
        _aten.addmm,
        _aten.bmm,
        _aten._grouped_mm,
        _aten._scaled_dot_product_flash_attention,
        _aten._scaled_dot_product_efficient_attention,
        _aten._scaled_dot_product_cudnn_attention,
        _aten._scaled_dot_product_flash_attention_for_cpu,
    )
}


def layers_of(backbone: nn.Module, depth: int) -> nn.ModuleList:
    """Return the backbone's list of `depth` layers. Raises ConfigError if it has none."""
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ConfigError(
        f"{type(backbone).__name__} has no list of {depth} layers, which ted, several micro-batches per pass and "
        "whole_layers need: set whole_layers to false"
    )


def prepare_layers(backbone: nn.Module, depth: int, section: Model) -> None:
    """Make ZeRO-3 gather each layer as a unit, and compile layers, if the model's `section` of the configuration asks.

    Must be called before DeepSpeed gets the model. Raises ConfigError if the backbone has no list of `depth` layers.
    """
    if not section.whole_layers:
        for part in _with_choices(backbone):
            deepspeed.utils.set_z3_leaf_module(part, True)
        return
    layers = layers_of(backbone, depth)
    deepspeed.utils.set_z3_leaf_modules(backbone, list({type(layer) for layer in layers}))
    for layer in layers:  # for a list, as OpenAI's GPT returns it, torch calls no hooks on gradients: ZeRO-3's are such
        layer.register_forward_hook(lambda _layer, _given, output: tuple(output) if type(output) is list else None)
    if section.compile_layers:
        compile_layers(layers, backbone.config)


def _with_choices(backbone: nn.Module) -> list[nn.Module]:
    """Return the modules in a backbone's layers that hold a list of modules, such as blocks of experts.

    A pass may leave out some of the list, on each rank others. Gathered one by one, they would be gathered by some of
    the ranks only: these would wait for ever.
    """
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    parts = dict.fromkeys(part for layers in lists for layer in layers for part in layer.modules())
    return [part for part in parts if any(isinstance(child, nn.ModuleList) for child in part.children())]


def experts_kernel(model: Any) -> str:
    """Return the name of transformers' way to compute a model's experts; "" for a dense model.

    It is "grouped_mm", one product over the experts in one tensor, wherever a family has it (transformers 5). On a GPU
    that is torch's kernel in bf16, and a loop of products else. A family without it loops over its experts ("eager").
    """
    if not experts_per_token(model.config.to_dict()):
        return ""
    return getattr(model.config, "_experts_implementation", None) or "eager"


def checkpoint_layers(model: Any, section: Student) -> None:
    """Make a transformers model recompute its layers' activations in the backward pass, if the configuration asks.

    "selective" keeps the results of matrix products and attention. With `offload_activations: cpu` what is kept of a
    layer, its input, waits for the backward pass in the host's memory.
    """
    if not section.gradient_checkpointing:
        return
    options = {"use_reentrant": False, "context_fn": partial(_contexts, section.gradient_checkpointing)}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if section.offload_activations == "cpu":
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = partial(_from_host, module._gradient_checkpointing_func)


def _from_host(checkpoint: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call torch's checkpoint such that the tensors that it saves, a layer's input, are on the host.

    Both copies are queued behind the computation, in pinned memory: the host does not wait for them.
    """
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(*arguments, **options)


def _contexts(mode: bool | str) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a layer's pass and of its recomputation, which has the same documents."""
    if mode != "selective":
        return nullcontext(), same_documents()
    passed, recomputed = create_selective_checkpoint_contexts(_keep_products)
    return passed, _both(same_documents(), recomputed)


@contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with first, second:
        yield


def _keep_products(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


class LayerByLayer:
    """Passes of several micro-batches through a backbone, in which each layer computes one micro-batch after the other.

    A layer's weights are gathered once for all micro-batches, and only one micro-batch's activations exist at a time.
    The results equal those of separate passes bit for bit; one product of all rows at once could be summed in another
    order.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._parts = 1
        for layer in layers:
            layer.forward = self._in_parts(layer.forward)

    @contextmanager
    def parts(self, count: int) -> Iterator[None]:
        """Make the layers split their inputs in the block into `count` equal micro-batches on the first axis."""
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
            for index in range(count):
                part = slice(index * rows // count, (index + 1) * rows // count)
                part_arguments, part_options = _rows((arguments, options), rows, part)
                with documents_in(part):
                    outputs.append(forward(hidden[part], *part_arguments, **part_options))
            if isinstance(outputs[0], torch.Tensor):
                return torch.cat(outputs)
            return (torch.cat([output[0] for output in outputs]), *outputs[0][1:])

        return run


def _rows(value: Any, rows: int, part: slice) -> Any:
    """Return `value` with each tensor that has all `rows` samples on its first axis cut to the samples of `part`."""
    if isinstance(value, torch.Tensor):
        return value[part] if value.dim() > 1 and len(value) == rows else value
    if isinstance(value, dict):
        return {key: _rows(item, rows, part) for key, item in value.items()}
    return type(value)(_rows(item, rows, part) for item in value) if isinstance(value, tuple | list) else value
