"""A decoder cut down in memory: which layers and channels matter on a text, and the model without the others.

Layers are ranked by the loss of the model without them (Shortened LLaMA, arXiv 2402.02834), on demand anew after each
one (SLEB, arXiv 2402.09025); neurons and channels by their mean absolute activation (Minitron, arXiv 2407.14679).
Models are transformers' causal LMs; a function that cuts one changes it in place and returns what this changes in
config.json.
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
"""Token ids, (B, L) int64 each."""
Changes = dict[str, Any]

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_READ_HIDDEN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_WRITE_HIDDEN = ("self_attn.o_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Ranking:
    """What leaving out layers costs; losses are nats per token."""

    loss: float
    """Of the whole model."""
    losses: list[float]
    """Without each layer; greedy: without it and those dropped before, when it was last measured."""
    dropped: list[int]
    """The least important first."""
    kept: list[int]


def decoder_layers(model: Any) -> nn.ModuleList:
    """The stack of decoder layers. Raises ConfigError where the model has none that can be cut."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != getattr(model.config, "num_hidden_layers", None):
        raise ConfigError(
            f"--teacher: {type(model).__name__} is not one stack of decoder layers (model.layers); layers are cut from "
            "models like Llama, Qwen2 and GPT-NeoX"
        )
    return layers


def kept_always(num_layers: int) -> set[int]:
    """The layers that are never dropped: models hardly work without their first, second or last one."""
    return {0, 1, num_layers - 1}


@torch.no_grad()
def mean_loss(model: Any, batches: Batches) -> float:
    """Mean next-token cross-entropy, nats per token."""
    return sum(_summed_loss(model, input_ids) for input_ids in batches) / _num_labels(batches)


@torch.no_grad()
def losses_without_each(model: Any, batches: Batches) -> tuple[float, list[float]]:
    """Loss of the model, and without each of its N layers: mean next-token cross-entropy, nats per token.

    Leaving out layer i computes the layers after i alone: what comes before is taken from the whole model's pass. So
    all N losses together cost N/2 passes. Memory: the hidden states of one batch at each layer.
    """
    layers = list(model.base_model.layers)
    whole, without = 0.0, [0.0] * len(layers)
    for input_ids in batches:
        calls: list[_Call] = []
        with _hooks(layer.register_forward_hook(_recorder(calls), with_kwargs=True) for layer in layers):
            whole += _summed_loss(model, input_ids)
        for number, call in enumerate(calls):
            with using_layers(model, [_Given(call, layers[number]), *layers[number + 1 :]]):
                without[number] += _summed_loss(model, input_ids)
    num_labels = _num_labels(batches)
    return whole / num_labels, [total / num_labels for total in without]


def rank_layers(model: Any, batches: Batches, keep: int, *, greedy: bool = False) -> Ranking:
    """Which `keep` layers (3 or more) matter most; the model stays as it is.

    `greedy` measures anew after each layer that is dropped. Raises ConfigError where the loss is not finite.
    """
    layers = list(decoder_layers(model))
    fixed = kept_always(len(layers))
    assert len(fixed) <= keep <= len(layers), f"{keep} of {len(layers)} layers"
    kept, dropped, losses = list(range(len(layers))), list[int](), [math.nan] * len(layers)
    whole: float | None = None
    while whole is None or len(kept) > keep:
        with using_layers(model, [layers[number] for number in kept]):
            loss, measured = losses_without_each(model, batches)
        if not all(map(math.isfinite, (loss, *measured))):
            raise ConfigError(f"--teacher: a loss on the text is not finite: {loss}, without each layer {measured}")
        whole = loss if whole is None else whole
        for number, value in zip(kept, measured, strict=True):
            losses[number] = value
        free = sorted((number for number in kept if number not in fixed), key=losses.__getitem__)
        surplus = len(kept) - keep
        dropped += free[: min(1, surplus) if greedy else surplus]
        kept = [number for number in kept if number not in dropped]
    return Ranking(whole, losses, dropped, kept)


def keep_layers(model: Any, kept: Sequence[int]) -> Changes:
    """Keep these layers alone, in order."""
    layers = decoder_layers(model)
    changes: Changes = {"num_hidden_layers": len(kept)}
    for key, value in model.config.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == len(layers):  # layer_types and its like
            changes[key] = [value[number] for number in kept]
    model.base_model.layers = nn.ModuleList([layers[number] for number in kept])
    for position, layer in enumerate(model.base_model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the layer's place in a key-value cache
                module.layer_idx = position
    return _configure(model, changes)


@torch.no_grad()
def narrow_mlp(model: Any, batches: Batches, size: int) -> Changes:
    """Keep in each gated MLP the `size` neurons with the largest mean |act(gate) * up| on the text.

    Raises ConfigError where the MLPs are not gated ones.
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
    """Keep the `size` hidden channels with the largest mean |activation| after the norms, over all layers.

    Attention heads keep number and size (`head_dim`). RMS norms divide by the mean over channels: their weights grow by
    sqrt(old / new size), so that leaving out channels that are zero leaves the model's output as it was.

    Raises ConfigError where the model is not like Llama.
    """
    layers = _llama_like(model, "--hidden")
    base, old = model.base_model, model.config.hidden_size
    norms = [*(getattr(layer, name) for layer in layers for name in _NORMS), base.norm]
    # Gemma's multiply by 1 + weight, and LayerNorm takes the mean off.
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
    """The model with these layers for its own."""
    own = model.base_model.layers
    model.base_model.layers = nn.ModuleList(layers)
    try:
        yield
    finally:
        model.base_model.layers = own


def _summed_loss(model: Any, input_ids: torch.Tensor) -> float:
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return float(cross_entropy(logits, input_ids[:, 1:].flatten(), reduction="none").double().sum())


def _num_labels(batches: Batches) -> int:
    return sum(input_ids[:, 1:].numel() for input_ids in batches)


def _llama_like(model: Any, option: str) -> list[Any]:
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
    """Indices of the `size` largest, in ascending order."""
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
    """A forward hook that adds |output|, or a pre-hook that adds |input|, (..., C), to `total` (C,)."""

    def add(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor | None = None) -> None:
        values = args[0] if output is None else output
        total.add_(values.flatten(0, -2).abs().sum(0, dtype=torch.float64))

    return add


def _recorder(calls: list[_Call]) -> Callable[..., None]:
    """A forward hook that appends each layer's call."""

    def record(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(_Call(args[0] if args else kwargs["hidden_states"], isinstance(output, tuple)))

    return record


@dataclass(frozen=True)
class _Call:
    """What a layer was given, and whether it answers with a tuple."""

    hidden: torch.Tensor
    as_tuple: bool


class _Given(nn.Module):
    """Stands for all layers up to one: answers with the hidden states that this one was given."""

    def __init__(self, call: _Call, layer: nn.Module) -> None:
        super().__init__()
        self._call = call
        self.attention_type = getattr(layer, "attention_type", None)  # some models choose a layer's mask by it

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return (self._call.hidden,) if self._call.as_tuple else self._call.hidden
