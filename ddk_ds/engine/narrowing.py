"""Pruning of a model's widths by activations on a text (Minitron, arXiv 2407.14679): neurons, heads, hidden channels.

Models like Llama, Qwen 2 and 3, Gemma 1 to 3: gated MLPs, attention by four projections, RMS norms. Each function
changes weights in place and returns the changes to config.json; `pruning.reconfigured` makes the model of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ddk_ds.engine.pruning import Batches, Changes, configure, decoder_layers, hooks, mean_loss
from ddk_ds.engine.unloaded_models import backbone_of
from ddk_ds.errors import ConfigError

_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_READ_HIDDEN = (*_ATTENTION[:3], *_MLP[:2])
_WRITE_HIDDEN = (_ATTENTION[3], _MLP[2])
_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_PER_HEAD = ("sinks",)
"""Parameters of an attention module with an element for each head, as gpt-oss has them."""


@torch.no_grad()
def narrow_mlp(model: Any, batches: Batches, size: int) -> Changes:
    """Cut each gated MLP to the `size` neurons with the largest mean |act(gate) * up| over the tokens of `batches`.

    Raises ConfigError if a layer has no such MLP.
    """
    mlps = [layer.mlp for layer in _layers_with(model, _MLP, "--intermediate")]
    sums = [torch.zeros(mlp.down_proj.weight.shape[1], dtype=torch.float64) for mlp in mlps]
    with hooks(mlp.down_proj.register_forward_pre_hook(_adder(total)) for mlp, total in zip(mlps, sums, strict=True)):
        mean_loss(model, batches)
    for mlp, total in zip(mlps, sums, strict=True):
        neurons = _largest(total, size)
        _cut(mlp.gate_proj, neurons, 0, "weight", "bias")
        _cut(mlp.up_proj, neurons, 0, "weight", "bias")
        _cut(mlp.down_proj, neurons, 1, "weight")
    return configure(model, {"intermediate_size": size})


@torch.no_grad()
def narrow_heads(model: Any, batches: Batches, groups: int) -> Changes:
    """Keep, in each layer, the `groups` groups of heads whose outputs have the largest norms, summed over the tokens.

    A group is a head of keys and values with its heads of queries. The size of a head stays.

    Raises ConfigError if attention is not made of four projections.
    """
    layers = _layers_with(model, _ATTENTION, "--kv-heads")
    heads, old = model.config.num_attention_heads, model.config.num_key_value_heads
    size = layers[0].self_attn.head_dim
    for layer in layers:
        others = {name for name, _ in layer.self_attn.named_parameters() if "_proj" not in name and "sinks" not in name}
        if any(layer.self_attn.get_parameter(name).shape[0] > size for name in others):
            raise _unlike(model, "--kv-heads")
    sums = [torch.zeros(heads, dtype=torch.float64) for _ in layers]
    pairs = [(layer.self_attn.o_proj, total) for layer, total in zip(layers, sums, strict=True)]
    with hooks(module.register_forward_pre_hook(_norm_adder(total)) for module, total in pairs):
        mean_loss(model, batches)
    for layer, total in zip(layers, sums, strict=True):
        kept = _largest(total.view(old, -1).sum(1), groups)
        queries = _parts(kept, heads // old)
        attention = layer.self_attn
        _cut(attention.q_proj, _parts(queries, size), 0, "weight", "bias")
        for projection in (attention.k_proj, attention.v_proj):
            _cut(projection, _parts(kept, size), 0, "weight", "bias")
        _cut(attention.o_proj, _parts(queries, size), 1, "weight")
        _cut(attention, queries, 0, *(name for name in _PER_HEAD if hasattr(attention, name)))
    sizes = {"num_attention_heads": groups * heads // old, "num_key_value_heads": groups, "head_dim": size}
    return configure(model, sizes)


@torch.no_grad()
def narrow_hidden(model: Any, batches: Batches, size: int) -> Changes:
    """Keep the `size` hidden channels with the largest mean |activation| after the norms, over layers and tokens.

    The number and the size (`head_dim`) of attention heads stay. RMS norms divide by the mean over channels, so what
    they multiply by grows by sqrt(old / new size): removing channels that are zero then does not change the output.
    Gemma multiplies embeddings by the root of the hidden size; they grow alike, and the last norm leaves it out.

    Raises ConfigError if the model is not like Llama or Gemma.
    """
    layers = _layers_with(model, (*_READ_HIDDEN, *_WRITE_HIDDEN), "--hidden")
    base: Any = backbone_of(model)
    old = model.config.hidden_size
    known = {"self_attn", "mlp", *_NORMS}
    if any({name for name, _ in layer.named_children()} - known for layer in layers) or not hasattr(base, "norm"):
        raise _unlike(model, "--hidden")
    norms = [*(getattr(layer, name) for layer in layers for name in _NORMS if hasattr(layer, name)), base.norm]
    offset = _norm_offset(model, norms)
    total = torch.zeros(old, dtype=torch.float64)
    with hooks(norm.register_forward_hook(_adder(total)) for norm in norms):
        mean_loss(model, batches)
    channels, growth = _largest(total, size), math.sqrt(old / size)
    scaled = model.config.model_type.startswith("gemma")
    head = model.get_output_embeddings()
    tied = head.weight is base.embed_tokens.weight
    for norm in norms:
        _cut(norm, channels, 0, "weight")
        factor = 1.0 if norm is base.norm and scaled and tied else growth
        norm.weight.add_(offset).mul_(factor).sub_(offset)
    for layer in layers:
        for name in _READ_HIDDEN:
            _cut(layer.get_submodule(name), channels, 1, "weight")
        for name in _WRITE_HIDDEN:
            _cut(layer.get_submodule(name), channels, 0, "weight", "bias")
    _cut(base.embed_tokens, channels, 1, "weight")
    if scaled:
        base.embed_tokens.weight.mul_(growth)
    if tied:
        head.weight = base.embed_tokens.weight
    else:
        _cut(head, channels, 1, "weight")
    return configure(model, {"hidden_size": size, "head_dim": layers[0].self_attn.head_dim})


def _norm_offset(model: Any, norms: list[Any]) -> float:
    """Return what the norms add to their weights: 0 in Llama, 1 in Gemma. Raise ConfigError for any other norms."""
    for offset in (0.0, 1.0):
        found = (norm(torch.ones(1, len(norm.weight))) for norm in norms)
        if all(
            torch.allclose(ones, norm.weight + offset, rtol=1e-3, atol=1e-5)
            for norm, ones in zip(norms, found, strict=True)
        ):
            return offset
    raise ConfigError(f"--hidden: {type(model).__name__} has other norms than RMSNorm; leave --hidden out")


def _layers_with(model: Any, parts: tuple[str, ...], option: str) -> list[Any]:
    """Return the layers of a model whose `parts` are linear; raise ConfigError, naming `option`, for another one."""
    layers = list(decoder_layers(model))
    try:
        linear = all(isinstance(layer.get_submodule(name), nn.Linear) for layer in layers for name in parts)
    except AttributeError:
        linear = False
    if not linear:
        raise _unlike(model, option)
    return layers


def _unlike(model: Any, option: str) -> ConfigError:
    return ConfigError(
        f"{option}: {type(model).__name__} is not made like Llama or Gemma in what this option cuts: leave {option} out"
    )


def _largest(totals: torch.Tensor, size: int) -> torch.Tensor:
    """Return the indices (size,) of the `size` largest elements of `totals` (C,); the indices ascend."""
    return totals.topk(size).indices.sort().values


def _parts(indices: torch.Tensor, size: int) -> torch.Tensor:
    """Return the indices (n * size,) of the elements of the n parts `indices`, each of `size` elements."""
    return (indices[:, None] * size + torch.arange(size)).flatten()


def _cut(module: Any, indices: torch.Tensor, dim: int, *names: str) -> None:
    for name in names:
        parameter = getattr(module, name)
        if parameter is not None:
            setattr(module, name, nn.Parameter(parameter.index_select(dim, indices), requires_grad=False))


def _adder(total: torch.Tensor) -> Callable[..., None]:
    """Return a hook that adds |output| of a forward hook, or |input| of a pre-hook, (..., C), to `total` (C,)."""

    def add(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor | None = None) -> None:
        values = args[0] if output is None else output
        total.add_(values.flatten(0, -2).abs().sum(0, dtype=torch.float64))

    return add


def _norm_adder(total: torch.Tensor) -> Callable[..., None]:
    """Return a pre-hook that adds the norm of each head's part of its input (..., heads * size) to `total` (heads,)."""

    def add(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        total.add_(args[0].flatten(0, -2).unflatten(-1, (len(total), -1)).norm(dim=-1).sum(0, dtype=torch.float64))

    return add
