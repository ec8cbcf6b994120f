"""The ZeRO-3 shards of a checkpoint, read one parameter at a time without a process group.

    <directory>/zero_pp_rank_0_mp_rank_00_model_states.pt              names and shapes, and the run's own state
    <directory>/[bf16_]zero_pp_rank_<rank>_mp_rank_00_optim_states.pt  each rank's slice of every group of parameters

Or the universal form of them (universal.py): <directory>/zero/<parameter>/fp32.pt, one whole tensor.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddk_ds.engine.shard_files import load_shard
from ddk_ds.errors import CheckpointError

MODEL_FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"
# Pages of a mapped file count as this process's memory until the file is closed.
_MAPPED_BYTES = 16 * 2**20


class _Place(NamedTuple):
    group: int
    start: int
    """In each rank's flat group, (elements of the group on a rank,)."""
    shape: torch.Size


class ZeroShards:
    """What `ranks` ranks saved in `directory`. Beyond the tensor that is read, little of it is in memory."""

    def __init__(self, directory: Path, ranks: int) -> None:
        self._files = [_optimizer_file(directory, rank) for rank in range(ranks)]
        self.model: dict[str, Any] = load_shard(directory / MODEL_FILE, mapped=False)
        """Rank 0's file beside the optimizer's: the run's own state is its "run"."""
        self._places = _places(self.model["param_shapes"], ranks)
        self._opened: list[dict[str, Any]] = []
        self._read_bytes = 0

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the trained parameters, by their names in the student's root module."""
        return {name: place.shape for name, place in self._places.items()}

    def read(self, name: str, key: str = "fp32", dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """One parameter's master weight ("fp32") or moment ("exp_avg", "exp_avg_sq"), whole and flat: (numel,).

        Raises CheckpointError where the shards do not hold it.
        """
        group, start, shape = self._places[name]
        whole = torch.empty(shape.numel(), dtype=dtype)
        # A parameter takes as many elements on every rank; the last ones are padded or all padding.
        for shard, part in zip(self._shards(), whole.split(math.ceil(shape.numel() / len(self._files))), strict=False):
            piece = _flat(shard, group, key)
            if len(piece) < start + len(part):
                raise CheckpointError(
                    f"{self._files[0].parent}: the shards lack {name}: with optimizer.offload: nvme they stay on each "
                    "node's disk; the run's own export at its end has the weights"
                )
            part.copy_(piece[start : start + len(part)])
        self._read_bytes += 4 * shape.numel()
        return whole

    def common(self) -> dict[str, Any]:
        """A shard without its tensors of parameters."""
        shard = self._shards()[0]
        optimizer = shard["optimizer_state_dict"]
        steps = {group: {"step": state["step"].clone()} for group, state in optimizer["state"].items()}
        return {
            **{key: value for key, value in shard.items() if key != "fp32_flat_groups"},
            "optimizer_state_dict": {"state": steps, "param_groups": optimizer["param_groups"]},
        }

    def _shards(self) -> list[dict[str, Any]]:
        if not self._opened or self._read_bytes > _MAPPED_BYTES:
            self._opened = []
            self._opened = [load_shard(path, mapped=True)["optimizer_state_dict"] for path in self._files]
            self._read_bytes = 0
        return self._opened


class UniversalShards:
    """The master weights of a universal checkpoint."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.model: dict[str, Any] = load_shard(directory / MODEL_FILE, mapped=False)
        """See `ZeroShards`."""

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """See `ZeroShards`."""
        return {name: shape for group in self.model["param_shapes"] for name, shape in group.items()}

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """One parameter's master weight, whole and flat: (numel,)."""
        tensor: torch.Tensor = load_shard(self._directory / "zero" / name / "fp32.pt", mapped=True)
        return tensor.to(dtype, copy=True)


def _optimizer_file(directory: Path, rank: int) -> Path:
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    return next(path for path in (directory / name, directory / f"bf16_{name}") if path.exists())


def _places(groups: list[dict[str, torch.Size]], ranks: int) -> dict[str, _Place]:
    places = {}
    for group, shapes in enumerate(groups):
        start = 0
        for name, shape in shapes.items():
            places[name] = _Place(group, start, shape)
            start += math.ceil(shape.numel() / ranks)
    return places


def _flat(shard: dict[str, Any], group: int, key: str) -> torch.Tensor:
    return shard["fp32_flat_groups"][group] if key == "fp32" else shard["optimizer_state_dict"]["state"][group][key]
