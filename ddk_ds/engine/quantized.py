"""The teacher's linear layers and its fused experts in 8 bits: int8, or FP8 (float8_e4m3fn).

A weight is a number of 8 bits times its row's scale (LLM.int8's absmax, arXiv 2208.07339, without its outlier columns).
ZeRO-3 shards and gathers a single dtype, so these numbers are stored as the bytes of a tensor in the compute dtype, in
bf16 with half as many elements. int8 saves memory and gathers: products are computed in the compute dtype, which
represents the integers exactly. In int8_dynamic and in FP8 a linear layer's input is rounded as well, with a scale for
each token: torch._int_mm multiplies with exact sums in int32, torch._scaled_mm with sums in float32 (docs/planning.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddk_ds.config.sections import Teacher
from ddk_ds.engine.config_sizes import is_expert, is_router
from ddk_ds.engine.eight_bits import FORMATS, LEAST_SHARE, Format, skipped_layers
from ddk_ds.engine.weights import full_shape
from ddk_ds.errors import ConfigError

_ROWS = 65536
"""Rows that are converted at a time: a layer's experts in float32 would take four times their memory."""
_SMALLEST_SCALE = 1e-30
"""Scale of rows of zeros, instead of 0. Smaller ones would have too few digits left to divide by."""
_LEAST_TOKENS = 17
"""Rows that torch._int_mm takes at least on CUDA; fewer are filled up with zeros, on every device."""


class QuantizedLinear(nn.Module):
    """A frozen linear layer y = (x @ q.T) * scale + bias with q (out, in) in 8 bits; some formats round x too."""

    def __init__(self, weight: Tensor, bias: Tensor | None, form: Format) -> None:
        """Quantize `weight` (out, in); it and `bias` (out,), which can be None, are in the compute dtype."""
        super().__init__()
        self._form = form
        values, scale = quantize(weight, form, weight.dtype)
        self.packed = nn.Parameter(values.view(weight.dtype), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., out) for x (..., in), both in the compute dtype; FP8 needs bf16."""
        stored = self.packed.view(self._form.dtype)
        if not self._form.rounds_inputs:
            y = F.linear(x, stored.to(x.dtype)) * self.scale
            return y if self.bias is None else y + self.bias
        rows, scales = quantize(x.reshape(-1, x.shape[-1]), self._form, torch.float32)
        if not self._form.dtype.is_floating_point:
            return self._in_integers(rows, scales, stored).to(x.dtype).view(*x.shape[:-1], len(stored))
        y = torch._scaled_mm(
            rows,
            stored.t(),
            scale_a=scales[:, None],
            scale_b=self.scale.float()[None],
            bias=self.bias,
            out_dtype=x.dtype,
        )
        return y.view(*x.shape[:-1], len(stored))

    def _in_integers(self, rows: Tensor, scales: Tensor, stored: Tensor) -> Tensor:
        """Return y (tokens, out) in float32 of rows (tokens, in) of integers with their scales (tokens,)."""
        filled = F.pad(rows, (0, 0, 0, max(0, _LEAST_TOKENS - len(rows))))
        sums = torch._int_mm(filled, stored.t())[: len(rows)]
        y = (sums * scales[:, None]).mul_(self.scale)
        return y if self.bias is None else y.add_(self.bias)


class QuantizedExperts(nn.Module):
    """A frozen module whose parameters of three axes, all experts' matrices in one, have 8 bits between its calls.

    A call computes with the weights that these stand for, rounded to the compute dtype; nothing else is rounded.
    """

    def __init__(self, experts: nn.Module, names: list[str], form: Format) -> None:
        """Take over `experts`, whose weights are gathered, and quantize its parameters of these `names`."""
        super().__init__()
        self._names, self._form = names, form
        for name in names:
            weight = getattr(experts, name).data
            values, scale = quantize(weight, form, weight.dtype)
            self.register_parameter(f"{name}_packed", nn.Parameter(values.view(weight.dtype), requires_grad=False))
            self.register_parameter(f"{name}_scale", nn.Parameter(scale, requires_grad=False))
            delattr(experts, name)
        self.experts = experts

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Return what the module returns."""
        try:
            for name in self._names:
                packed, scale = self.get_parameter(f"{name}_packed"), self.get_parameter(f"{name}_scale")
                weight = packed.view(self._form.dtype).to(packed.dtype).mul_(scale[..., None])
                self.experts.__dict__[name] = weight
            return self.experts(*arguments, **options)
        finally:
            for name in self._names:
                self.experts.__dict__.pop(name, None)


def quantize(values: Tensor, form: Format, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `values` (..., in) in 8 bits, and the scale (...) of each row, in `scale_dtype`.

    Rows with NaN or infinity have a scale that is neither.
    """
    largest = torch.linalg.vector_norm(values, torch.inf, -1)
    scale = (largest.float() / form.largest).clamp_(min=_SMALLEST_SCALE).to(scale_dtype)
    small = torch.empty(values.shape, dtype=form.dtype, device=values.device)
    rows = zip(values.flatten(0, -2).split(_ROWS), scale.float().flatten().split(_ROWS), strict=True)
    for part, (exact, step) in zip(small.flatten(0, -2).split(_ROWS), rows, strict=True):
        # In bf16 a scale is off by 2^-8 at most: 448 becomes 450 at most, which the conversion rounds to 448 again.
        steps = exact / step[:, None]
        part.copy_(steps if form.dtype.is_floating_point else steps.round_().clamp_(-form.largest, form.largest))
    return small, scale


@torch.no_grad()
def quantize_layers(
    layers: nn.ModuleList, section: Teacher, config: dict[str, Any], shard: Callable[[nn.Module], object]
) -> list[str]:
    """Quantize the linear modules and fused experts in `layers`, layer by layer; return what stays as it was, in words.

    Collective if they are sharded by ZeRO-3. `section` names format and layers, `config` is the model's config.json,
    and `shard` shards each layer's new modules. Routers stay as they are: their small errors would choose other
    experts. Raises ConfigError if less than half of the weights of the layers that are not skipped can be quantized.
    """
    form, skipped = FORMATS[section.quantize], skipped_layers(section, len(layers))
    num_weights = num_quantized = 0
    unfit: dict[str, None] = {}
    for number, layer in enumerate(layers):
        if number in skipped:
            continue
        num_weights += sum(full_shape(parameter).numel() for parameter in layer.parameters())
        new = nn.ModuleDict()
        for path, module in list(layer.named_modules()):
            parameters: dict[str, Any] = dict(module.named_parameters(recurse=False))
            shapes = {name: full_shape(p) for name, p in parameters.items()}
            names = [name for name in parameters if _is_matrix(module, f".{path}.{name}", shapes[name], config)]
            for name in [name for name in names if not form.fits(shapes[name], parameters[name].itemsize)]:
                unfit[f"{path}.{name} of {' x '.join(map(str, shapes[name]))}"] = None
                names.remove(name)
            if not names:
                continue
            num_quantized += sum(shapes[name].numel() for name in names)
            with deepspeed.zero.GatheredParameters(list(parameters.values())):
                if isinstance(module, nn.Linear):
                    new[path.replace(".", "/")] = QuantizedLinear(module.weight.data, module.bias, form)
                else:
                    new[path.replace(".", "/")] = QuantizedExperts(module, names, form)
        shard(new)
        for path, module in new.items():
            layer.set_submodule(path.replace("/", "."), module)
    if num_quantized < LEAST_SHARE * num_weights:
        raise ConfigError(
            f"teacher.quantize: {section.quantize} would leave {1 - num_quantized / num_weights:.0%} of the weights of "
            f"{type(layers[0]).__name__} as they are: only torch.nn.Linear, with sides that are multiples of 16 "
            "for fp8 and of 8 for int8_dynamic, and experts joined in tensors of three axes are quantized; set none"
        )
    return [*(f"layer {number}" for number in sorted(skipped)), *unfit]


def _is_matrix(module: nn.Module, name: str, shape: Any, config: dict[str, Any]) -> bool:
    """Return True for a linear layer's matrix, but not a router's, and for matrices of all experts in one tensor."""
    if type(module) is nn.Linear:
        return name.endswith(".weight") and not is_router(name, shape, config)
    return len(shape) == 3 and is_expert(name, shape, config)
