"""Hidden states of chosen layers, and the linear filters that map them to one width (TED, arXiv 2210.01351)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from ddk_ds.comm import Comm, call_together
from ddk_ds.config import Config
from ddk_ds.engine.layers import layers_of
from ddk_ds.engine.model_files import ModelFiles
from ddk_ds.errors import ConfigError
from ddk_ds.files import new_file, size_and_xxh64, written

DEFAULT_PAIRS = 4


@dataclass(frozen=True)
class FilterShape:
    """The matched layers, and the widths of both models."""

    pairs: tuple[tuple[int, int], ...]
    """(student's layer, teacher's layer) of each pair, counted from 0."""
    student_width: int
    teacher_width: int


def filter_shape(config: Config, student: ModelFiles, teacher: ModelFiles) -> FilterShape:
    """Return the layers that `ted.layers` or its default matches; ConfigError for a layer that does not exist."""
    depths = student.num_layers, teacher.num_layers
    pairs = config.ted.layers
    if pairs is None:
        count = min(DEFAULT_PAIRS, *depths)
        ends = [(n + 1) / count for n in range(count)]
        pairs = tuple((round(end * depths[0]) - 1, round(end * depths[1]) - 1) for end in ends)
    for pair in pairs:
        for layer, depth, model in zip(pair, depths, ("student", "teacher"), strict=True):
            if layer >= depth:
                raise ConfigError(f"ted.layers: {list(pair)}: the {model} has {depth} layers, numbered from 0")
    return FilterShape(pairs, student.width, teacher.width)


def check_filters(path: Path, shape: FilterShape) -> str:
    """Return the xxh64 of the file `ted.filters`; ConfigError if it is missing or its filters do not fit `shape`."""
    if not path.is_file():
        raise ConfigError(f"ted.filters {path}: there is no such file: it is what a run of method: ted_filters exports")
    widths = {"student": shape.student_width, "teacher": shape.teacher_width}
    pairs = range(len(shape.pairs))
    expected = {f"{m}.{pair}.weight": [shape.teacher_width, width] for m, width in widths.items() for pair in pairs}
    try:
        with safe_open(path, "pt") as file:
            stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"ted.filters {path}: is not a safetensors file: {error}") from error
    if stored != expected:
        raise ConfigError(
            f"ted.filters {path}: holds filters {stored}, this run has {expected}: give ted.layers and models as there"
        )
    return size_and_xxh64(path)[1]


class LayerTaps:
    """Hooks that record the outputs of some layers of a backbone during its forward pass."""

    def __init__(self, backbone: nn.Module, layers: Sequence[int], depth: int) -> None:
        self._outputs: dict[int, torch.Tensor] | None = None
        self._order = tuple(layers)
        blocks = layers_of(backbone, depth)
        for layer in set(layers):
            blocks[layer].register_forward_hook(self._hook(layer))

    @contextmanager
    def recording(self) -> Iterator[list[torch.Tensor]]:
        """Record the block's forward pass; then the list holds (B*L, H) of each layer, in the order of `layers`."""
        states: list[torch.Tensor] = []
        self._outputs = {}
        try:
            yield states
            states += [self._outputs[layer].flatten(0, 1) for layer in self._order]
        finally:
            self._outputs = None  # gradient checkpointing runs the layers, and the hooks, again in the backward pass

    def _hook(self, layer: int) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._outputs is not None:
                self._outputs[layer] = output[0] if isinstance(output, tuple) else output

        return record


class Filter(nn.Linear):
    """A linear map W rms_norm(hidden). Residual streams grow from layer to layer; normalised they are comparable.

    W begins as the identity, or as a random projection that preserves lengths if the widths differ.
    """

    def __init__(self, width: int, out: int, seed: int) -> None:
        self._seed = seed
        super().__init__(width, out, bias=False)

    def reset_parameters(self) -> None:
        """Initialise the weight; torch calls this at construction."""
        if self.in_features == self.out_features:
            nn.init.eye_(self.weight)
        else:
            generator = torch.Generator().manual_seed(self._seed)
            drawn = torch.randn(self.weight.shape, generator=generator) / math.sqrt(self.in_features)
            with torch.no_grad():
                self.weight.copy_(drawn)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden (n, H) to (n, Ht)."""
        scale = hidden.float().pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
        return super().forward((hidden * scale).to(self.weight.dtype))


class LayerFilters(nn.Module):
    """A filter for each matched layer of the student and of the teacher."""

    def __init__(self, shape: FilterShape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        out = shape.teacher_width
        seeds = range(seed, seed + len(shape.pairs))
        self.student = nn.ModuleList(Filter(shape.student_width, out, number) for number in seeds)
        self.teacher = nn.ModuleList(Filter(out, out, number) for number in seeds)

    def forward(
        self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Filter the hidden states (n, Hs) and (n, Ht) of each pair; both results are lists of (n, Ht)."""
        of_student = [layer(states) for layer, states in zip(self.student, student, strict=True)]
        of_teacher = [layer(states) for layer, states in zip(self.teacher, teacher, strict=True)]
        return of_student, of_teacher


def build_filters(config: Config, shape: FilterShape, ds_config: dict[str, Any], comm: Comm) -> LayerFilters:
    """Make sharded filters, new or from `ted.filters` with the teacher's frozen (see `Preset.filters`). Collective."""
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        filters = LayerFilters(shape, config.seed)
    if config.preset.filters == "loaded":
        assert config.ted.filters is not None, "checked with the configuration"
        values = load_file(config.ted.filters) if comm.rank == 0 else {}
        for name, parameter in filters.named_parameters():
            with GatheredParameters([parameter], modifier_rank=0):
                if comm.rank == 0:
                    parameter.data.copy_(values[name])
        filters.teacher.requires_grad_(False)
    return filters


def write_filters(filters: LayerFilters, path: Path, comm: Comm) -> None:
    """Write all filters to one safetensors file. Collective. Raises CheckpointError if rank 0 cannot write it."""
    values = {}
    for name, parameter in filters.named_parameters():
        with GatheredParameters([parameter]):
            if comm.rank == 0:
                values[name] = parameter.detach().float().cpu().clone()

    def write() -> None:
        with written(path), new_file(path) as partial:
            partial.write_bytes(save(values))

    call_together(comm, write if comm.rank == 0 else lambda: None)
