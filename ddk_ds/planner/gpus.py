"""Figures of GPUs and of the cluster, as far as a plan needs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ddk_ds.config import Section
from ddk_ds.config.sections import OpenFraction, PositiveFloat
from ddk_ds.engine.flops import PEAK_FLOP_PER_S
from ddk_ds.errors import ConfigError

DEFAULT_MFU = 0.4
DEFAULT_STORAGE_BYTES_PER_S = 5e9
LINK_EFFICIENCY = 0.8
"""Share of a link's nominal bandwidth that large collectives reach."""
MEMORY_EFFICIENCY = 0.8
"""Share of the memory's nominal bandwidth that kernels which only read and write reach."""


@dataclass(frozen=True)
class Speed:
    """Assumed or measured speed of the GPUs and of the storage."""

    mfu: float | None = DEFAULT_MFU
    """Share of the peak that a step's model FLOPs reach; None where `tokens_per_s_per_gpu` is given."""
    tokens_per_s_per_gpu: float | None = None
    """Throughput that a run of this configuration has shown."""
    storage_bytes_per_s: float = DEFAULT_STORAGE_BYTES_PER_S
    """Bandwidth at which all ranks together write a checkpoint."""


class Gpu(Section):
    """A GPU and its links, in bytes and seconds; bandwidths are of one direction."""

    name: str
    """Name in tables."""
    peak_flop_per_s: PositiveFloat
    """Peak for dense bf16 (not the figure with sparsity, which is twice as high)."""
    memory_bytes: PositiveFloat
    """Size of its memory."""
    hbm_bytes_per_s: PositiveFloat
    """Bandwidth of its memory."""
    nvlink_bytes_per_s: PositiveFloat
    """Bandwidth to the other GPUs of its node."""
    network_bytes_per_s: PositiveFloat
    """Bandwidth to other nodes: that of a node's adapters, divided by its GPUs."""
    host_bytes_per_s: PositiveFloat = 25e9
    """Bandwidth to its host's memory (PCIe)."""
    fp8_peak_flop_per_s: PositiveFloat | None = None
    """Peak for dense FP8; null if it has none."""
    int8_peak_flop_per_s: PositiveFloat | None = None
    """Peak for dense int8; null if it has none."""
    compute_efficiency: OpenFraction = 0.4
    """Share of the peak that a step's matmuls reach while nothing waits."""
    source: str = "given by the user"
    """Source of the figures, for the plan's list of assumptions."""

    def peak_in_8_bits(self, quantize: str) -> float | None:
        """Return the peak of the products of a `teacher.quantize` that rounds inputs; None if there is none."""
        return {"fp8": self.fp8_peak_flop_per_s, "int8_dynamic": self.int8_peak_flop_per_s}.get(quantize)


_SHEETS = "NVIDIA's data sheets of {} (peak, memory, NVLink) and of {} (network)"
_MEASURED = "; efficiency: median of llm-foundry's runs on one node without checkpointing (docs/planning.md)"


def _a100(name: str, memory_bytes: float, hbm_bytes_per_s: float, efficiency: float) -> Gpu:
    return Gpu(
        name=name,
        peak_flop_per_s=PEAK_FLOP_PER_S["A100"],
        memory_bytes=memory_bytes,
        hbm_bytes_per_s=hbm_bytes_per_s,
        nvlink_bytes_per_s=300e9,
        network_bytes_per_s=25e9,
        host_bytes_per_s=25e9,
        int8_peak_flop_per_s=624e12,
        compute_efficiency=efficiency,
        source=_SHEETS.format("A100 SXM", "DGX A100, 8 x 200 Gb/s") + _MEASURED,
    )


def _hopper(name: str, memory_bytes: float, hbm_bytes_per_s: float) -> Gpu:
    return Gpu(
        name=name,
        peak_flop_per_s=PEAK_FLOP_PER_S["H100"],
        memory_bytes=memory_bytes,
        hbm_bytes_per_s=hbm_bytes_per_s,
        nvlink_bytes_per_s=450e9,
        network_bytes_per_s=50e9,
        host_bytes_per_s=50e9,
        fp8_peak_flop_per_s=1979e12,
        int8_peak_flop_per_s=1979e12,
        compute_efficiency=0.42,
        source=_SHEETS.format(f"{name.split()[0]} SXM", "DGX H100, 8 x 400 Gb/s") + _MEASURED,
    )


GPUS = {
    "a100-40g": _a100("A100 40 GB", 40e9, 1.555e12, 0.57),
    "a100-80g": _a100("A100 80 GB", 80e9, 2.039e12, 0.61),
    "h100-80g": _hopper("H100 80 GB", 80e9, 3.35e12),
    "h200-141g": _hopper("H200 141 GB", 141e9, 4.8e12),
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU of that name, or read a YAML file of `Gpu`'s keys. Raises ConfigError if it is neither.

    H100-80GB and h100 are h100-80g: capitals do not count, nor a last B, and the size can be left out if only one has
    this name.
    """
    path, plain = Path(name), name.lower().removesuffix("b")
    named = [known for known in GPUS if plain in (known, known.partition("-")[0])]
    if len(named) == 1:
        return GPUS[named[0]]
    if len(named) > 1 and not path.is_file():
        raise ConfigError(f"--gpu {name}: there are two of them: {' or '.join(named)}")
    if not path.is_file():
        raise ConfigError(f"--gpu {name}: neither one of {', '.join(GPUS)} nor a YAML file of a GPU's figures")
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--gpu {name}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--gpu {name}: holds {type(values).__name__}, expected keys: {', '.join(Gpu.model_fields)}")
    try:
        # YAML reads 312e12, which has no sign after the e, as text; here it counts as a number.
        return Gpu.model_validate({key: _number(value) for key, value in values.items()})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg'].lower()}" for item in error.errors())
        raise ConfigError(f"--gpu {name}: {wrong}. Its keys: {', '.join(Gpu.model_fields)}") from error


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


@dataclass(frozen=True)
class Cluster:
    """A number of nodes with the same number of the same GPU each."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        """Return the number of GPUs of all nodes."""
        return self.nodes * self.gpus_per_node
