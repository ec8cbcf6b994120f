"""Pruning of a mixture of experts: each layer keeps the experts to which a text's tokens are sent most often.

The router's rows follow the experts. It chooses among those that are left, so a token whose expert is gone goes to its
next best one. transformers 4 has a module for each expert, transformers 5 and gpt-oss all experts in one 3-D tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ddk_ds.engine.config_sizes import SIZE_KEYS, config_size
from ddk_ds.engine.pruning import Batches, Changes, configure, decoder_layers, hooks, mean_loss
from ddk_ds.errors import ConfigError

_ROUTERS = ("gate", "router")


class Uses(NamedTuple):
    """The tokens that each expert of a layer computed (E,), and the numbers of the experts kept."""

    counts: list[int]
    kept: list[int]


@torch.no_grad()
def drop_experts(model: Any, batches: Batches, number: int, per_token: int) -> tuple[Changes, dict[int, Uses]]:
    """Keep the `number` experts of each layer that compute most tokens of `batches`; return the changes and the uses.

    Experts that a router chooses by groups are kept in equal numbers of each group. The uses have the numbers of the
    model's layers.

    Raises ConfigError if the model's experts are not made as described above, or if the groups are not alike.
    """
    values = model.config.to_dict()
    total = config_size(values, "experts")
    groups = values.get("n_group") or 1
    if number % groups or per_token > number // groups * (values.get("topk_group") or groups):
        raise ConfigError(
            f"--experts is {number}: the router chooses {per_token} experts a token out of {groups} equal groups: give "
            f"a multiple of {groups} that has room for them"
        )
    blocks = _blocks(model)
    counts = {layer: torch.zeros(total, dtype=torch.int64) for layer in blocks}
    with hooks(handle for layer, block in blocks.items() for handle in _counters(block, counts[layer])):
        mean_loss(model, batches)
    tokens = sum(input_ids.numel() for input_ids in batches)
    uses = {}
    for layer, block in blocks.items():
        if int(counts[layer].sum()) != tokens * config_size(values, "experts per token"):
            raise _unlike(model)
        best = counts[layer].view(groups, -1).topk(number // groups).indices
        kept = (best + torch.arange(groups)[:, None] * (total // groups)).flatten().sort().values
        _keep(block, kept)
        uses[layer] = Uses(counts[layer].tolist(), kept.tolist())
    sizes = {"experts": number, "experts per token": per_token}
    changes = {key: size for name, size in sizes.items() for key in SIZE_KEYS[name] if isinstance(values.get(key), int)}
    return configure(model, changes), uses


def _blocks(model: Any) -> dict[int, Any]:
    """Return the module that holds a router and its experts, of each layer that has them."""
    found = {}
    for number, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            if hasattr(module, "experts") and any(hasattr(module, name) for name in _ROUTERS):
                found[number] = module
    if not found:
        raise _unlike(model)
    return found


def _counters(block: Any, counts: torch.Tensor) -> list[Any]:
    """Return the handles of hooks that add the tokens which each expert computes to `counts` (E,)."""
    experts = block.experts
    if isinstance(experts, nn.ModuleList):
        return [expert.register_forward_pre_hook(_row_counter(counts, i)) for i, expert in enumerate(experts)]

    def count(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.dtype == torch.int64:  # the experts chosen, (tokens, k)
                counts.add_(torch.bincount(value.flatten(), minlength=len(counts)))

    return [experts.register_forward_pre_hook(count, with_kwargs=True)]


def _row_counter(counts: torch.Tensor, expert: int) -> Callable[..., None]:
    def count(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        counts[expert] += args[0].numel() // args[0].shape[-1]

    return count


def _keep(block: Any, kept: torch.Tensor) -> None:
    """Cut the experts, and all that the router has of each of them."""
    number = len(kept)
    if isinstance(block.experts, nn.ModuleList):
        total = len(block.experts)
        block.experts = nn.ModuleList([block.experts[int(expert)] for expert in kept])
        parts = []
    else:
        total = len(next(block.experts.parameters()))
        parts = [block.experts]
    parts += [getattr(block, name) for name in _ROUTERS if hasattr(block, name)]
    for module in (module for part in parts for module in part.modules()):
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if len(tensor.shape) and tensor.shape[0] == total != number:
                cut = tensor.index_select(0, kept)
                keep = nn.Parameter(cut, requires_grad=False) if isinstance(tensor, nn.Parameter) else cut
                setattr(module, name, keep)


def _unlike(model: Any) -> ConfigError:
    return ConfigError(
        f"--experts: {type(model).__name__} has no layers of a router and experts that are made as in Qwen3-MoE, "
        "Mixtral, DeepSeek-V3 or gpt-oss: leave --experts out"
    )
