"""Weights between safetensors files and ZeRO-3 partitions, one tensor at a time: no rank ever holds a complete model.

Files are written tensor by tensor after a header that is known before, so that no shard is ever in memory. The format:
8 bytes of little-endian length, a JSON header of that length, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
from torch import nn

from ddk_ds.comm import Comm, raise_together
from ddk_ds.engine.conversion import Conversion, conversions, model_tensors, revert_weight_conversion
from ddk_ds.engine.model_files import ModelFiles
from ddk_ds.errors import ConfigError, UserError
from ddk_ds.files import written

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # of buffers
_ALIGNMENT = 8  # bytes: the first tensor begins at a multiple of it
MAX_SHARD_BYTES = 5 * 10**9


def load_weights(model: nn.Module, files: ModelFiles, comm: Comm) -> None:
    """Fill the parameters, sharded or not, and the buffers of `model` from its safetensors files.

    The first rank of each node reads a tensor, casts it and broadcasts it within the node; each rank keeps its slice,
    or all of it. The host holds one tensor of the model in addition to these, and while that is made of several stored
    ones, as are a layer's joined experts, twice its size. Collective. Raises ConfigError if the files lack a tensor
    that the model needs, or have another shape.
    """
    targets = model_tensors(model)
    loaded: set[int] = set()
    for conversion in conversions(model, files):
        _load(conversion, targets, files, comm)
        loaded |= {id(targets[name]) for name in conversion.targets}
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in loaded]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ConfigError(f"{files.directory}: its weights lack {shown}; is config.json that of these weights?")


def full_shape(parameter: Any) -> torch.Size:
    """Return the shape of a complete parameter, which may be sharded."""
    return getattr(parameter, "ds_shape", parameter.shape)


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return by name the buffers that a checkpoint of the model holds, such as a router's correction."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def saved_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a complete model by the names and in the form that its files have."""
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors: dict[str, torch.Tensor] = revert_weight_conversion(model, own | persistent_buffers(model))
    return tensors


def _load(conversion: Conversion, targets: dict[str, torch.Tensor], files: ModelFiles, comm: Comm) -> None:
    dtype = targets[next(iter(conversion.targets))].dtype

    def read(source: str) -> torch.Tensor:
        return files.read(source) if conversion.plain else files.read(source).to(dtype)

    found = conversion.to_model(read) if comm.local_rank == 0 else {}
    for name, shape in conversion.targets.items():
        target: Any = targets[name]
        if comm.local_rank == 0:
            full = found.pop(name).to(device=target.device, dtype=target.dtype, copy=conversion.plain)
        else:
            full = torch.empty(shape, dtype=target.dtype, device=target.device)
        comm.broadcast_in_node(full)
        if hasattr(target, "ds_id"):
            # As all_gather and copy_ would do, but without a gather: DeepSpeed gets the full tensor and cuts its slice.
            target.data = full
            target.ds_status = ZeroParamStatus.AVAILABLE
            target.partition(has_been_updated=True)
        else:
            target.data.copy_(full)


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor that will be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """Return the specification of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def save_weights(
    parameters: Mapping[str, nn.Parameter],
    stored: Sequence[Conversion],
    directory: Path,
    comm: Comm,
    poll: Callable[[], None] = lambda: None,
    *,
    buffers: Mapping[str, torch.Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model's parameters as Hugging Face safetensors shards. Collective; rank 0 writes.

    Rank 0 holds one full tensor at a time, and what is `stored` of it. `poll` is called before each tensor; if it
    raises, the export ends. Rank 0 writes its `buffers` after the parameters. Raises CheckpointError on every rank if
    rank 0 cannot write.
    """
    specs = {
        name: TensorSpec(shape, parameters[next(iter(conversion.targets))].dtype)
        for conversion in stored
        for name, shape in conversion.sources.items()
    }
    specs |= {name: TensorSpec.of(buffer) for name, buffer in (buffers or {}).items()}
    tensors = chain(_gathered(parameters, stored, comm, poll), (buffers or {}).values())
    failure: UserError | None = None
    try:
        with written(directory):
            if comm.rank == 0:
                write_tensors(directory, specs, tensors, max_shard_bytes)
    except UserError as error:
        failure = error
    for _ in tensors:  # the other ranks take part in the gathers, and rank 0 in those that are left
        pass
    raise_together(comm, failure)


def _gathered(
    parameters: Mapping[str, nn.Parameter], stored: Sequence[Conversion], comm: Comm, poll: Callable[[], None]
) -> Iterator[torch.Tensor]:
    """Yield each tensor as it is stored, in host memory, on rank 0; the other ranks yield empty tensors.

    `poll` is called before each gather. Collective.
    """
    for conversion in stored:
        poll()
        full = {}
        with GatheredParameters([parameters[name] for name in conversion.targets]):
            if comm.rank == 0:
                full = {name: parameters[name].detach().cpu().clone() for name in conversion.targets}
        if comm.rank == 0:
            yield from conversion.to_files(full).values()
        else:
            yield torch.empty(0)


def write_tensors(
    directory: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[torch.Tensor], max_shard_bytes: int
) -> None:
    """Write `tensors`, which must come in the order of `specs`, to one file or to shards with an index.

    A tensor larger than `max_shard_bytes` gets a separate shard.
    """
    shards = _shards(specs, max_shard_bytes)
    weight_map = {}
    iterator = iter(tensors)
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / file, {name: specs[name] for name in names}, iterator)
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


def _write_shard(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterator[torch.Tensor]) -> None:
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
            stream.write(_content(name, next(tensors), spec))
        stream.flush()
        os.fsync(stream.fileno())


def _content(name: str, tensor: torch.Tensor, spec: TensorSpec) -> memoryview:
    actual = TensorSpec.of(tensor)
    assert actual == spec, f"{name} is {actual}, but the header says {spec}"
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
