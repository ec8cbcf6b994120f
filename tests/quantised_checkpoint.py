"""Checkpoints in FP8 for tests: the file formats of the hub, and the float32 weights that they stand for by numpy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
BLOCK = (32, 16)  # neither divides every matrix below
PER_ROW = {"num_bits": 8, "type": "float", "strategy": "channel"}


def compressed(strategy: str, **other: Any) -> dict[str, Any]:
    group = {"weights": PER_ROW | {"strategy": strategy}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"a": group}} | other


# The section of config.json, what a scale's name adds, and the shape of the scales of a matrix.
FORMATS: dict[str, tuple[dict[str, Any], str, Callable[[int, int], tuple[int, ...]]]] = {
    "blocks": (
        {"quant_method": "fp8", "weight_block_size": list(BLOCK)},
        "_scale_inv",
        lambda rows, columns: (-(-rows // BLOCK[0]), -(-columns // BLOCK[1])),
    ),
    "rows": ({"quant_method": "fbgemm_fp8"}, "_scale", lambda rows, _: (rows, 1)),
    "compressed-tensors, rows": (compressed("channel"), "_scale", lambda rows, _: (rows, 1)),
    "compressed-tensors, a tensor": (compressed("tensor"), "_scale", lambda *_: (1,)),
}


def write_fp8(plain: Path, out: Path, kind: str) -> Tensors:
    """Write the model `plain` with its layers in FP8 to `out`, and give `plain` the weights that those stand for.

    Returns these weights.
    """
    section, suffix, scales_of = FORMATS[kind]
    torch.manual_seed(0)
    right, stored = load_file(plain / "model.safetensors"), {}
    for name, weight in list(right.items()):
        stored[name] = weight
        if ".layers." in name and weight.ndim == 2:
            values = (weight * 900).to(torch.float8_e4m3fn)
            scale = torch.rand(scales_of(*weight.shape)) / 500 + 1e-4
            stored[name], stored[name + suffix] = values, scale
            wide = scale.double().numpy()
            if kind == "blocks":
                wide = np.kron(wide, np.ones(BLOCK))[: weight.shape[0], : weight.shape[1]]
            right[name] = torch.from_numpy((values.double().numpy() * wide).astype(np.float32))
    save_file(right, plain / "model.safetensors", {"format": "pt"})
    write_quantised(out, plain, stored, section)
    return right


def write_quantised(directory: Path, like: Path, stored: Tensors, section: dict[str, Any]) -> None:
    """Write tensors as two files with an index, and the configuration of `like` with a section on quantisation."""
    directory.mkdir(exist_ok=True)
    config = json.loads((like / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    names, weight_map = sorted(stored), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):  # a weight and its scale are in different files
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: stored[name] for name in part}, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
