"""Hugging Face safetensors shards, written tensor by tensor: no shard is ever in memory.

The format: 8 bytes of little-endian length, a JSON header of that length, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_ALIGNMENT = 8  # of the first tensor's bytes


class TensorSpec(NamedTuple):
    """A tensor before it is there."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    directory: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[torch.Tensor], max_shard_bytes: int
) -> None:
    """Write `tensors`, which come in the order of `specs`, as one file or as shards with an index.

    A tensor larger than `max_shard_bytes` has a shard of its own.
    """
    shards = _shards(specs, max_shard_bytes)
    weight_map = {}
    coming = iter(tensors)
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / file, {name: specs[name] for name in names}, coming)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(spec.num_bytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> Sequence[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.num_bytes
    return shards


def _write_shard(path: Path, specs: Mapping[str, TensorSpec], coming: Iterator[torch.Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.num_bytes
        header[name] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, spec in specs.items():
            stream.write(_content(name, next(coming), spec))
        stream.flush()
        os.fsync(stream.fileno())


def _content(name: str, tensor: torch.Tensor, spec: TensorSpec) -> memoryview:
    found = TensorSpec(tuple(tensor.shape), tensor.dtype)
    assert found == spec, f"{name} is {found}, announced was {spec}"
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
