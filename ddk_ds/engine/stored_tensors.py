"""Tensors of a checkpoint as they are stored: plain numbers, or FP8 and MXFP4 numbers that are multiplied by scales.

A quantised checkpoint names its format in config.json (`quantization_config`). Those that are known here are read as
the numbers they stand for; any other is refused, because weights without their scales are another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from ddk_ds.errors import ConfigError

FLOATS = {"F64", "F32", "BF16", "F16"}
"""Dtypes of weights that need no scales, as safetensors names them."""
_FP8 = {"F8_E4M3", "F8_E5M2"}
_FP8_METHODS = {"fp8": "_scale_inv", "fbgemm_fp8": "_scale", "compressed-tensors": "_scale"}
"""Formats of FP8 weights, and what a scale's name adds to that of its weight."""
_MXFP4 = "mxfp4"
# The numbers of 4 bits: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, 5.3.3).
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_BIAS = 127
KNOWN_FORMATS = "FP8 (fp8, fbgemm_fp8, compressed-tensors' float-quantized) or MXFP4"


class Scale(NamedTuple):
    """The scales of a quantised tensor."""

    name: str
    file: Path
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale; None where the scales' shape says it, by broadcasting."""


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint: its file, its shape when read, its dtype in the file, and what it needs to be read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str = "F32"
    scale: Scale | None = None
    stored_name: str = ""
    """The name in the file, where that is another."""

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor `name` in the dtype of its file; a quantised one as the numbers that it stands for.

        These are float32 for FP8, each rounded once, and bf16 for MXFP4, which is exact.
        """
        # The file is opened for each tensor, so that the pages of earlier tensors leave this process's memory.
        with safe_open(self.file, framework="pt") as reader:
            values: torch.Tensor = reader.get_tensor(self.stored_name or name)
        if self.scale is None:
            return values
        with safe_open(self.scale.file, framework="pt") as reader:
            scale: torch.Tensor = reader.get_tensor(self.scale.name)
        if self.dtype == "U8":
            return _from_mxfp4(values, scale)
        if self.scale.block is not None:
            rows, columns = self.scale.block
            scale = scale.float().repeat_interleave(rows, 0)[: values.shape[0]]
            scale = scale.repeat_interleave(columns, 1)[:, : values.shape[1]]
        return values.float().mul_(scale.float())


def _from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the weights (E, in, out) of blocks (E, out, in / 32, 16) and scales (E, out, in / 32).

    A byte of a block holds two numbers, the first in its lower half. gpt-oss stores its experts so, and transformers'
    model holds them transposed.
    """
    numbers = torch.tensor(_FP4 + tuple(-number for number in _FP4), dtype=torch.bfloat16)
    experts, rows, groups, half = blocks.shape
    result = torch.empty(experts, groups * half * 2, rows, dtype=torch.bfloat16)
    for expert in range(experts):
        pairs = torch.stack((blocks[expert] & 15, blocks[expert] >> 4), -1).flatten(-2)
        factors = torch.exp2(scales[expert].float() - _E8M0_BIAS).bfloat16()
        result[expert] = (numbers[pairs.int()] * factors[..., None]).flatten(1).T
    return result


def read_entries(
    config: Mapping[str, Any], entries: Mapping[str, tuple[Path, Mapping[str, Any]]], where: str
) -> dict[str, StoredTensor]:
    """Return the tensors that a checkpoint stands for, from the file and the header's entry of each stored one.

    `where` begins the messages. Raises ConfigError if the weights are quantised in a way that is not known here.
    """
    stored = {name: StoredTensor(file, tuple(e["shape"]), e["dtype"]) for name, (file, e) in entries.items()}
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    quantization = config.get("quantization_config", inner)
    if quantization is None:
        _check_floats(stored, where)
        return stored
    method = str(quantization.get("quant_method"))
    if method == _MXFP4:
        tensors = _with_mxfp4(stored, where)
    elif method in _FP8_METHODS and _is_plain_fp8(method, quantization):
        tensors = _with_fp8(stored, _FP8_METHODS[method], quantization.get("weight_block_size"), where)
    else:
        raise ConfigError(
            f"{where} is quantised by {method!r} (quantization_config of its config.json), which cannot be read here: "
            f"give the model's full weights, or weights in {KNOWN_FORMATS}"
        )
    _check_floats({name: tensor for name, tensor in tensors.items() if tensor.scale is None}, where)
    return tensors


def _is_plain_fp8(method: str, quantization: Mapping[str, Any]) -> bool:
    """Return True unless compressed-tensors stores anything but FP8 weights with a scale a tensor or a row."""
    if method != "compressed-tensors":
        return True
    groups = [group.get("weights") or {} for group in (quantization.get("config_groups") or {}).values()]
    plain = all(
        (group.get("num_bits"), group.get("type")) == (8, "float") and group.get("strategy") in ("tensor", "channel")
        for group in groups
    )
    sparse = (quantization.get("sparsity_config") or {}).get("format", "dense") != "dense"
    return quantization.get("format") == "float-quantized" and bool(groups) and plain and not sparse


def _with_fp8(
    stored: Mapping[str, StoredTensor], suffix: str, block: list[int] | None, where: str
) -> dict[str, StoredTensor]:
    tensors = {}
    scales = {name + suffix for name, tensor in stored.items() if tensor.dtype in _FP8}
    for name, tensor in stored.items():
        if name in scales:
            continue
        if tensor.dtype in _FP8:
            scale = stored.get(name + suffix)
            if scale is None:
                raise ConfigError(f"{where}: {name} is stored in 8 bits without {name}{suffix}: copy the model again")
            size = (block[0], block[1]) if block else None
            expected = (
                tensor.shape if size is None else tuple(-(-n // b) for n, b in zip(tensor.shape, size, strict=True))
            )
            if scale.shape not in (expected, (*expected[:-1], 1), (1,), ()) or (size and scale.shape != expected):
                raise ConfigError(f"{where}: {name}{suffix} has shape {scale.shape}, which {name} {tensor.shape} lacks")
            tensor = tensor._replace(scale=Scale(name + suffix, scale.file, size))
        tensors[name] = tensor
    return tensors


def _with_mxfp4(stored: Mapping[str, StoredTensor], where: str) -> dict[str, StoredTensor]:
    tensors = {}
    for name, tensor in stored.items():
        base = name.removesuffix("_blocks")
        if base != name and tensor.dtype == "U8":
            scale = stored.get(base + "_scales")
            if scale is None or scale.shape != tensor.shape[:-1] or len(tensor.shape) != 4:
                raise ConfigError(f"{where}: {name} {tensor.shape} has no {base}_scales that fit: copy the model again")
            experts, rows, groups, half = tensor.shape
            shape = (experts, groups * half * 2, rows)
            tensors[base] = StoredTensor(tensor.file, shape, "U8", Scale(base + "_scales", scale.file), name)
        elif not (name.endswith("_scales") and name.removesuffix("_scales") + "_blocks" in stored):
            tensors[name] = tensor
    return tensors


def _check_floats(tensors: Mapping[str, StoredTensor], where: str) -> None:
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.dtype not in FLOATS:
            raise ConfigError(
                f"{where}: {name} is stored as {tensor.dtype}, and its config.json does not say how it is quantised: "
                "give the model's full weights"
            )
