"""Linear layers of a frozen model in 8 bits: a weight is an integer times its row's scale (LLM.int8's absmax, arXiv
2208.07339, without its outlier columns).

ZeRO-3 shards and gathers one dtype, so a weight's integers rest as the bytes of a tensor in the compute dtype: half as
many elements in bf16. Products are made in the compute dtype, in which the integers are exact.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddk_ds.errors import ConfigError

LEVELS = 127


class Int8Linear(nn.Module):
    """y = (x @ q.T) * scale + bias for q (out, in) int8; nothing of it has a gradient."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` (out, in), `bias` (out,) or None, in the compute dtype."""
        super().__init__()
        integers, scale = quantize(weight)
        self.packed = nn.Parameter(integers.view(weight.dtype), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = F.linear(x, self.packed.view(torch.int8).to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> integers int8 (out, in) in -127..127, and scale (out,) in the weight's dtype."""
    scale = (weight.float().abs().amax(1) / LEVELS).to(weight.dtype)
    steps = torch.where(scale > 0, scale, 1).float()
    return (weight.float() / steps[:, None]).round().clamp_(-LEVELS, LEVELS).to(torch.int8), scale


@torch.no_grad()
def quantize_layers(layers: nn.ModuleList, ds_config: dict[str, Any], group: Any) -> None:
    """Replace every linear layer in the sharded `layers`, one layer of the model after the other. Collective.

    Raises ConfigError where there is none, or one whose rows do not fill whole elements.
    """
    replaced = 0
    for layer in layers:
        found = {name: module for name, module in layer.named_modules() if type(module) is nn.Linear}
        new = nn.ModuleDict()
        for name, module in found.items():
            parts = [part for part in (module.weight, module.bias) if part is not None]
            with deepspeed.zero.GatheredParameters(parts):
                width = module.weight.shape[1]
                if width % module.weight.itemsize:
                    raise ConfigError(f"teacher.quantize: {name} has rows of {width}, which do not fill whole elements")
                new[name.replace(".", "/")] = Int8Linear(module.weight.data, module.bias)
        deepspeed.zero.Init(module=new, config_dict_or_path=ds_config, data_parallel_group=group)
        for name in found:
            layer.set_submodule(name, new[name.replace(".", "/")])
        replaced += len(found)
    if not replaced:
        raise ConfigError("teacher.quantize: int8, and its layers have no torch.nn.Linear: set none")
