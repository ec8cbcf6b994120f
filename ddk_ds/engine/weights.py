"""Weights in and out of ZeRO-3 partitions, one tensor at a time: no rank ever holds a whole model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ddk_ds.comm import Comm
from ddk_ds.engine.compat import model_names
from ddk_ds.engine.model_files import ModelFiles
from ddk_ds.errors import ConfigError


def load_weights(model: nn.Module, files: ModelFiles, comm: Comm) -> None:
    """Fill the partitioned parameters and the buffers of `model` from its safetensors files.

    The first rank of each node reads a tensor, casts it and broadcasts it within the node; each rank keeps its slice.
    Host memory beyond the shards: the largest tensor. Collective. Raises ConfigError naming tensors that the model
    needs and the files lack, and shapes that differ.
    """
    targets = _targets(model)
    sources = source_names(model, files)
    loaded: set[int] = set()
    for name, source in sources.items():
        target = targets[name]
        if id(target) not in loaded:
            _load_tensor(target, source, files, comm)
            loaded.add(id(target))
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in loaded]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ConfigError(f"{files.directory}: its weights lack {shown}; is config.json that of these weights?")


def source_names(model: nn.Module, files: ModelFiles) -> dict[str, str]:
    """The model's name of a tensor -> its name in the files. Some hub checkpoints leave out the backbone's prefix."""
    stored = model_names(model, files.tensors)
    prefix = getattr(model, "base_model_prefix", "")
    sources = {}
    for name in _targets(model):
        source = stored.get(name) or stored.get(name.removeprefix(prefix + "."))
        if source is not None:
            sources[name] = source
    return sources


def _targets(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def _load_tensor(target: Any, source: str, files: ModelFiles, comm: Comm) -> None:
    partitioned = hasattr(target, "ds_id")
    shape = tuple(target.ds_shape if partitioned else target.shape)
    stored = files.tensors[source]
    if stored.shape != shape:
        raise ConfigError(f"{stored.file}: {source} has shape {stored.shape}, config.json gives {shape}: not a pair")
    if comm.local_rank == 0:
        # Opened anew for each tensor, so that pages of the ones before leave this process's memory.
        with safe_open(stored.file, framework="pt") as reader:
            full = reader.get_tensor(source).to(device=target.device, dtype=target.dtype, copy=True)
    else:
        full = torch.empty(shape, dtype=target.dtype, device=target.device)
    comm.broadcast_in_node(full)
    if not partitioned:
        target.data.copy_(full)
        return
    # What all_gather + copy_ would do, without the gather: hand DeepSpeed the whole tensor and let it cut its slice.
    target.data = full
    target.ds_status = ZeroParamStatus.AVAILABLE
    target.partition(has_been_updated=True)


def gathered_tensors(names: dict[str, nn.Parameter], comm: Comm) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor in host memory) on rank 0 one after the other; other ranks take part and get empty ones."""
    for name, parameter in names.items():
        with GatheredParameters([parameter]):
            yield name, parameter.detach().cpu().clone() if comm.rank == 0 else torch.empty(0)


def save_weights(
    names: dict[str, nn.Parameter],
    directory: Path,
    comm: Comm,
    poll: Callable[[], None] = lambda: None,
    *,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Write the parameters as Hugging Face safetensors shards of bounded size. Collective; rank 0 writes."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(pending, directory / f"model-{len(shards) + 1:05d}.safetensors", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in gathered_tensors(names, comm):
        poll()
        if comm.rank != 0:
            continue
        num_bytes = tensor.numel() * tensor.element_size()
        if pending and size + num_bytes > max_shard_bytes:
            flush()
            size = 0
        pending[name] = tensor
        size += num_bytes
        total += num_bytes
    if comm.rank != 0:
        return
    flush()
    _name_shards(directory, shards, total)


def _name_shards(directory: Path, shards: list[list[str]], total_bytes: int) -> None:
    if len(shards) == 1:
        (directory / "model-00001.safetensors").rename(directory / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"model-{number:05d}.safetensors").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
