"""Pruning of a causal LM in memory: ranking of its layers, neurons and channels on a text, and removal of the others.

Layers are ranked by the loss of the model without them (Shortened LLaMA, arXiv 2402.02834), with `greedy` again after
each removal (SLEB, arXiv 2402.09025); neurons and channels by their mean absolute activation (Minitron, arXiv
2407.14679). A function that prunes a model changes it in place and returns the changes to its config.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ddk_ds.errors import ConfigError

Batches = Sequence[torch.Tensor]
"""Tensors of token ids, each (B, L) int64."""
Changes = dict[str, Any]
"""New values of keys of config.json."""

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_READ_HIDDEN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_WRITE_HIDDEN = ("self_attn.o_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


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
    layers = getattr(model.base_model, "layers", None)
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
    layers = list(model.base_model.layers)
    full, without = 0.0, [0.0] * len(layers)
    for input_ids in batches:
        calls: list[_Call] = []
        with _hooks(layer.register_forward_hook(_recorder(calls), with_kwargs=True) for layer in layers):
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
    changes: Changes = {"num_hidden_layers": len(kept)}
    for key, value in model.config.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == len(layers):  # such as layer_types
            changes[key] = [value[number] for number in kept]
    model.base_model.layers = nn.ModuleList([layers[number] for number in kept])
    for position, layer in enumerate(model.base_model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the layer's position in a key-value cache
                module.layer_idx = position
    return _configure(model, changes)


@torch.no_grad()
def narrow_mlp(model: Any, batches: Batches, size: int) -> Changes:
    """Cut each gated MLP to the `size` neurons with the largest mean |act(gate) * up| over the tokens of `batches`.

    The model is changed in place; the changes to its config.json are returned. Raises ConfigError if it is not like
    Llama.
    """
    mlps = [layer.mlp for layer in _llama_like(model, "--intermediate")]
    sums = [torch.zeros(mlp.down_proj.weight.shape[1], dtype=torch.float64) for mlp in mlps]
    with _hooks(mlp.down_proj.register_forward_pre_hook(_adder(total)) for mlp, total in zip(mlps, sums, strict=True)):
        mean_loss(model, batches)
    for mlp, total in zip(mlps, sums, strict=True):
        neurons = _largest(total, size)
        _cut(mlp.gate_proj, neurons, 0, "weight", "bias")
        _cut(mlp.up_proj, neurons, 0, "weight", "bias")
        _cut(mlp.down_proj, neurons, 1, "weight")
    return _configure(model, {"intermediate_size": size})


@torch.no_grad()
def narrow_hidden(model: Any, batches: Batches, size: int) -> Changes:
    """Keep the `size` hidden channels with the largest mean |activation| after the norms, over layers and tokens.

    The number and the size (`head_dim`) of attention heads stay. RMS norms divide by the mean over channels, so their
    weights are multiplied by sqrt(old / new size): removing channels that are zero then does not change the output.

    Raises ConfigError if the model is not like Llama.
    """
    layers = _llama_like(model, "--hidden")
    base, old = model.base_model, model.config.hidden_size
    norms = [*(getattr(layer, name) for layer in layers for name in _NORMS), base.norm]
    # Gemma's norms multiply by 1 + weight, and LayerNorm subtracts the mean.
    if not all(torch.allclose(norm(torch.ones(1, old)), norm.weight, rtol=1e-3, atol=1e-6) for norm in norms):
        raise ConfigError(f"--hidden: {type(model).__name__} has other norms than Llama's RMSNorm; leave --hidden out")
    total = torch.zeros(old, dtype=torch.float64)
    with _hooks(norm.register_forward_hook(_adder(total)) for norm in norms):
        mean_loss(model, batches)
    channels = _largest(total, size)
    for norm in norms:
        _cut(norm, channels, 0, "weight")
        norm.weight.mul_(math.sqrt(old / size))
    for layer in layers:
        for name in _READ_HIDDEN:
            _cut(layer.get_submodule(name), channels, 1, "weight")
        for name in _WRITE_HIDDEN:
            _cut(layer.get_submodule(name), channels, 0, "weight", "bias")
    head = model.get_output_embeddings()
    tied = head.weight is base.embed_tokens.weight
    _cut(base.embed_tokens, channels, 1, "weight")
    if tied:
        head.weight = base.embed_tokens.weight
    else:
        _cut(head, channels, 1, "weight")
    return _configure(model, {"hidden_size": size, "head_dim": layers[0].self_attn.head_dim})


@contextmanager
def using_layers(model: Any, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Replace the model's layers by `layers` until the end of the block."""
    original = model.base_model.layers
    model.base_model.layers = nn.ModuleList(layers)
    try:
        yield
    finally:
        model.base_model.layers = original


def _summed_loss(model: Any, input_ids: torch.Tensor) -> float:
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return float(cross_entropy(logits, input_ids[:, 1:].flatten(), reduction="none").double().sum())


def _num_labels(batches: Batches) -> int:
    return sum(input_ids[:, 1:].numel() for input_ids in batches)


def _llama_like(model: Any, option: str) -> list[Any]:
    """Return the layers of a model that is made like Llama; raise ConfigError, naming `option`, for another one."""
    layers = list(decoder_layers(model))
    try:
        for layer in layers:
            alike = {name for name, _ in layer.named_children()} == _LAYER
            parts = [layer.get_submodule(name) for name in (*_READ_HIDDEN, *_WRITE_HIDDEN)]
            if not alike or not all(isinstance(part, nn.Linear) for part in parts):
                raise AttributeError
        if not all(isinstance(getattr(model.base_model, name), nn.Module) for name in ("embed_tokens", "norm")):
            raise AttributeError
    except AttributeError:
        raise ConfigError(
            f"{option}: {type(model).__name__} is not made like Llama (gated MLP, two norms a layer); its layers alone "
            f"can be cut: leave {option} out"
        ) from None
    return layers


def _largest(totals: torch.Tensor, size: int) -> torch.Tensor:
    """Return the indices (size,) of the `size` largest elements of `totals` (C,); the indices ascend."""
    return totals.topk(size).indices.sort().values


def _cut(module: Any, indices: torch.Tensor, dim: int, *names: str) -> None:
    for name in names:
        parameter = getattr(module, name)
        if parameter is not None:
            setattr(module, name, nn.Parameter(parameter.index_select(dim, indices), requires_grad=False))


def _configure(model: Any, changes: Changes) -> Changes:
    for key, value in changes.items():
        setattr(model.config, key, value)
    return changes


@contextmanager
def _hooks(handles: Iterator[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def _adder(total: torch.Tensor) -> Callable[..., None]:
    """Return a hook that adds |output| of a forward hook, or |input| of a pre-hook, (..., C), to `total` (C,)."""

    def add(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor | None = None) -> None:
        values = args[0] if output is None else output
        total.add_(values.flatten(0, -2).abs().sum(0, dtype=torch.float64))

    return add


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
        self.attention_type = getattr(layer, "attention_type", None)  # some models choose a layer's mask by it

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return (self._call.hidden,) if self._call.as_tuple else self._call.hidden
