"""The teacher's linear layers and its fused experts in 8 bits.

A weight is an integer times its row's scale (LLM.int8's absmax, arXiv 2208.07339, without its outlier columns). ZeRO-3
shards and gathers a single dtype, so the integers of a weight are stored as the bytes of a tensor in the compute dtype,
in bf16 with half as many elements. Products are computed in the compute dtype, which represents the integers exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddk_ds.engine.config_sizes import is_expert, is_router
from ddk_ds.engine.weights import full_shape
from ddk_ds.errors import ConfigError

INT8_MAX = 127
_LEAST_SHARE = 0.5
"""Share of the layers' weights that must become integers: what is left would otherwise take the memory as before."""


class Int8Linear(nn.Module):
    """A frozen linear layer y = (x @ q.T) * scale + bias with q (out, in) int8."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantize `weight` (out, in); it and `bias` (out,), which can be None, are in the compute dtype."""
        super().__init__()
        integers, scale = quantize(weight)
        self.packed = nn.Parameter(integers.view(weight.dtype), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., out) for x (..., in) in the compute dtype."""
        y = F.linear(x, self.packed.view(torch.int8).to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


class Int8Experts(nn.Module):
    """A frozen module whose parameters of three axes, all experts' matrices in one, are integers between its calls.

    A call computes with the weights that the integers stand for, rounded to the compute dtype.
    """

    def __init__(self, experts: nn.Module, names: list[str]) -> None:
        """Take over `experts`, whose weights are gathered, and quantize its parameters of these `names`."""
        super().__init__()
        self._names = names
        for name in names:
            weight = getattr(experts, name).data
            integers, scale = quantize(weight)
            self.register_parameter(f"{name}_packed", nn.Parameter(integers.view(weight.dtype), requires_grad=False))
            self.register_parameter(f"{name}_scale", nn.Parameter(scale, requires_grad=False))
            delattr(experts, name)
        self.experts = experts

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Return what the module returns."""
        try:
            for name in self._names:
                packed, scale = self.get_parameter(f"{name}_packed"), self.get_parameter(f"{name}_scale")
                weight = packed.view(torch.int8).to(packed.dtype).mul_(scale[..., None])
                self.experts.__dict__[name] = weight
            return self.experts(*arguments, **options)
        finally:
            for name in self._names:
                self.experts.__dict__.pop(name, None)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 integers in -127..127 of the shape of `weight` (..., in), and a scale (...) in its dtype."""
    scale = (weight.abs().amax(-1).float() / INT8_MAX).to(weight.dtype)
    steps = torch.where(scale > 0, scale, 1).float()
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    rows = zip(weight.flatten(0, -2).split(_ROWS), steps.flatten().split(_ROWS), strict=True)
    for part, (values, step) in zip(integers.flatten(0, -2).split(_ROWS), rows, strict=True):
        part.copy_((values.float() / step[:, None]).round().clamp_(-INT8_MAX, INT8_MAX))
    return integers, scale


_ROWS = 65536
"""Rows that are converted at a time: a layer's experts in float32 would take four times their memory."""


@torch.no_grad()
def quantize_layers(layers: nn.ModuleList, config: dict[str, Any], shard: Callable[[nn.Module], object]) -> None:
    """Quantize the linear modules and fused experts in `layers`, layer by layer. Collective if ZeRO-3 shards them.

    `config` is the model's config.json, and `shard` shards each layer's new modules. Routers stay as they are: their
    small errors would choose other experts.
    Raises ConfigError if less than half of the layers' weights can be quantized, or if a weight's rows do not fill
    whole elements of the compute dtype.
    """
    num_weights = num_quantized = 0
    for layer in layers:
        num_weights += sum(_elements(parameter) for parameter in layer.parameters())
        new = nn.ModuleDict()
        for path, module in list(layer.named_modules()):
            parameters: dict[str, Any] = dict(module.named_parameters(recurse=False))
            names = [name for name, p in parameters.items() if _fits(module, f".{path}.{name}", full_shape(p), config)]
            for name in names:
                width = full_shape(parameters[name])[-1]
                if width % parameters[name].itemsize:
                    raise ConfigError(f"teacher.quantize: {path} has rows of {width}, which do not fill whole elements")
                num_quantized += _elements(parameters[name])
            if not names:
                continue
            with deepspeed.zero.GatheredParameters(list(parameters.values())):
                if isinstance(module, nn.Linear):
                    new[path.replace(".", "/")] = Int8Linear(module.weight.data, module.bias)
                else:
                    new[path.replace(".", "/")] = Int8Experts(module, names)
        shard(new)
        for path, module in new.items():
            layer.set_submodule(path.replace("/", "."), module)
    if num_quantized < _LEAST_SHARE * num_weights:
        raise ConfigError(
            f"teacher.quantize: int8 would leave {1 - num_quantized / num_weights:.0%} of the weights of "
            f"{type(layers[0]).__name__} as they are: only torch.nn.Linear and experts joined in tensors of three axes "
            "are quantized; set none"
        )


def _elements(parameter: Any) -> int:
    return full_shape(parameter).numel()


def _fits(module: nn.Module, name: str, shape: Any, config: dict[str, Any]) -> bool:
    """Return True for a linear layer's matrix, but not a router's, and for matrices of all experts in one tensor."""
    if type(module) is nn.Linear:
        return name.endswith(".weight") and not is_router(name, shape, config)
    return len(shape) == 3 and is_expert(name, shape, config)
