"""Pruning of a causal LM in memory: ranking of its layers on a text, and removal of the others.

Layers are ranked by the loss of the model without them (Shortened LLaMA, arXiv 2402.02834), with `greedy` again after
each removal (SLEB, arXiv 2402.09025). What makes a model narrower is in narrowing.py and expert_pruning.py. A function
that prunes a model changes its weights in place and returns the changes to its config.json; `reconfigured` makes a
model of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ddk_ds.engine.unloaded_models import backbone_of, no_init_weights
from ddk_ds.errors import ConfigError

Batches = Sequence[torch.Tensor]
"""Tensors of token ids, each (B, L) int64."""
Changes = dict[str, Any]
"""New values of keys of config.json."""

# Keys of config.json that list the numbers of layers which have no experts, or which have them.
_LAYER_NUMBERS = ("mlp_only_layers", "moe_layers")


@dataclass(frozen=True)
class Ranking:
    """Layers ranked by the loss of the model without them; losses are nats per token."""

    loss: float
    """Loss of the complete model."""
    losses: list[float]
    """Loss of the model without each layer. With `greedy` it is the last loss measured without that layer; the
    layers dropped before are absent too."""
    dropped: list[int]
    """Numbers of the dropped layers, the least important first."""
    kept: list[int]
    """Numbers of the kept layers in ascending order."""


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the model's list of decoder layers. Raises ConfigError if `model.layers` does not hold all its layers."""
    layers: Any = getattr(backbone_of(model), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != getattr(model.config, "num_hidden_layers", None):
        raise ConfigError(
            f"--teacher: {type(model).__name__} is not one stack of decoder layers (model.layers); layers are cut from "
            "models like Llama, Qwen2 and GPT-NeoX"
        )
    return layers


def kept_always(num_layers: int) -> set[int]:
    """Return the numbers of the layers that are never dropped: without them models hardly work."""
    return {0, 1, num_layers - 1}


@torch.no_grad()
def mean_loss(model: Any, batches: Batches) -> float:
    """Return the model's mean next-token cross-entropy over all tokens of `batches`, in nats per token."""
    return sum(_summed_loss(model, input_ids) for input_ids in batches) / _num_labels(batches)


@torch.no_grad()
def losses_without_each(model: Any, batches: Batches) -> tuple[float, list[float]]:
    """Return the `mean_loss` of the model, and of the model without each of its N layers.

    Without layer i only the layers after i are computed, from the hidden states that the complete model's pass gave to
    layer i. So all N losses together cost N/2 passes. Memory holds the hidden states of one batch at each layer.
    """
    backbone: Any = backbone_of(model)
    layers = list(backbone.layers)
    full, without = 0.0, [0.0] * len(layers)
    for input_ids in batches:
        calls: list[_Call] = []
        with hooks(layer.register_forward_hook(_recorder(calls), with_kwargs=True) for layer in layers):
            full += _summed_loss(model, input_ids)
        for number, call in enumerate(calls):
            with using_layers(model, [_Replay(call, layers[number]), *layers[number + 1 :]]):
                without[number] += _summed_loss(model, input_ids)
    num_labels = _num_labels(batches)
    return full / num_labels, [total / num_labels for total in without]


def rank_layers(model: Any, batches: Batches, keep: int, *, greedy: bool = False) -> Ranking:
    """Rank the layers by the loss of the model without each, and choose the `keep` layers to keep.

    The layers of `kept_always` are kept, so `keep` is 3 or more, and those of the others without which the loss is
    largest. With `greedy` the losses are measured again after each dropped layer, else only once. The model is not
    changed. Raises ConfigError if a loss is not finite.
    """
    layers = list(decoder_layers(model))
    fixed = kept_always(len(layers))
    assert len(fixed) <= keep <= len(layers), f"{keep} of {len(layers)} layers"
    kept, dropped, losses = list(range(len(layers))), list[int](), [math.nan] * len(layers)
    full_loss: float | None = None
    while full_loss is None or len(kept) > keep:
        with using_layers(model, [layers[number] for number in kept]):
            loss, measured = losses_without_each(model, batches)
        if not all(map(math.isfinite, (loss, *measured))):
            raise ConfigError(f"--teacher: a loss on the text is not finite: {loss}, without each layer {measured}")
        full_loss = loss if full_loss is None else full_loss
        for number, value in zip(kept, measured, strict=True):
            losses[number] = value
        free = sorted((number for number in kept if number not in fixed), key=losses.__getitem__)
        surplus = len(kept) - keep
        dropped += free[: min(1, surplus) if greedy else surplus]
        kept = [number for number in kept if number not in dropped]
    return Ranking(full_loss, losses, dropped, kept)


def keep_layers(model: Any, kept: Sequence[int]) -> Changes:
    """Remove all layers except those with the numbers `kept`, which get this order; return the changes."""
    layers = decoder_layers(model)
    changes = _kinds(model.config, kept)
    backbone: Any = backbone_of(model)
    backbone.layers = nn.ModuleList([layers[number] for number in kept])
    for position, layer in enumerate(backbone.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the layer's position in a key-value cache
                module.layer_idx = position
    return configure(model, changes)


def _kinds(config: Any, kept: Sequence[int]) -> Changes:
    """Return the changes to the configuration by which each kept layer stays what it is.

    That is its kind of attention (`layer_types`), and whether it has experts, which configurations say in four ways.
    """
    values = config.to_dict()
    changes: Changes = {"num_hidden_layers": len(kept)}
    for key, value in values.items():
        if key in _LAYER_NUMBERS and value is not None:
            changes[key] = [position for position, number in enumerate(kept) if number in value]
        elif "layer" in key and isinstance(value, list) and len(value) == config.num_hidden_layers:
            changes[key] = [value[number] for number in kept]
    if values.get("first_k_dense_replace"):
        changes["first_k_dense_replace"] = sum(number < values["first_k_dense_replace"] for number in kept)
    if (step := values.get("decoder_sparse_step") or 1) > 1:
        dense = [number for number in kept if (number + 1) % step or number in (values.get("mlp_only_layers") or ())]
        changes["mlp_only_layers"] = [position for position, number in enumerate(kept) if number in dense]
        changes["decoder_sparse_step"] = 1
    return changes


def reconfigured(model: Any, changes: Changes) -> Any:
    """Return a model of the changed configuration with the weights of `model`, which were cut to fit it.

    Its class makes everything else anew: numbers of heads and experts in modules, and buffers that no file holds.
    """
    values = {**model.config.to_dict(), **changes}
    config = type(model.config).from_dict(values)
    with no_init_weights():
        result = type(model)._from_config(config, attn_implementation=model.config._attn_implementation)
    result.load_state_dict(model.state_dict(), assign=True)
    result.tie_weights()
    return result.eval().requires_grad_(False)


@contextmanager
def using_layers(model: Any, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Replace the model's layers by some of them, or by their replacements, until the end of the block.

    transformers 5 looks up a layer's kind of attention in the configuration by its place, so the kinds move with them.
    """
    backbone: Any = backbone_of(model)
    original, kinds = backbone.layers, getattr(model.config, "layer_types", None)
    places = {id(layer): place for place, layer in enumerate(original)}
    backbone.layers = nn.ModuleList(layers)
    if kinds is not None:
        model.config.layer_types = [kinds[places[getattr(layer, "stands_for", id(layer))]] for layer in layers]
    try:
        yield
    finally:
        backbone.layers = original
        if kinds is not None:
            model.config.layer_types = kinds


def _summed_loss(model: Any, input_ids: torch.Tensor) -> float:
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return float(cross_entropy(logits, input_ids[:, 1:].flatten(), reduction="none").double().sum())


def _num_labels(batches: Batches) -> int:
    return sum(input_ids[:, 1:].numel() for input_ids in batches)


def configure(model: Any, changes: Changes) -> Changes:
    """Change the model's configuration, and return the changes."""
    for key, value in changes.items():
        setattr(model.config, key, value)
    return changes


@contextmanager
def hooks(handles: Iterable[Any]) -> Iterator[None]:
    """Keep hooks, which were registered while `handles` is read, until the end of the block."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def _recorder(calls: list[_Call]) -> Callable[..., None]:
    """Return a forward hook that appends each layer's call to `calls`."""

    def record(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(_Call(args[0] if args else kwargs["hidden_states"], isinstance(output, tuple)))

    return record


@dataclass(frozen=True)
class _Call:
    """The hidden states that a layer got as input, and True in `as_tuple` if it returns a tuple."""

    hidden: torch.Tensor
    as_tuple: bool


class _Replay(nn.Module):
    """Replacement of a layer and all layers before it, which returns the hidden states that the layer got as input."""

    def __init__(self, call: _Call, layer: nn.Module) -> None:
        super().__init__()
        self._call = call
        self.stands_for = id(layer)
        self.attention_type = getattr(layer, "attention_type", None)  # some models choose a layer's mask by it

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return (self._call.hidden,) if self._call.as_tuple else self._call.hidden
