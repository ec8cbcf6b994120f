"""DeepSpeed's universal checkpoint, which any number of ranks can load, made from the ZeRO-3 shards of another number.

    <target>/zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt    one whole tensor each
    <target>/zero/optimizer_state.pt                          what all shards share
    <target>/zero_pp_rank_0_mp_rank_00_model_states.pt        the run's own state

DeepSpeed's converter is for one machine, writes everything twice and unpickles. Here every rank writes its share of the
parameters straight from the mapped shards; the files are equal (tests/dist/test_universal.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ddk_ds.engine.shard_files import ShardWriter, load_shard

_MODEL = "zero_pp_rank_0_mp_rank_00_model_states.pt"


def write_universal(
    source: Path, target: Path, *, source_ranks: int, rank: int, world_size: int
) -> tuple[dict[Path, tuple[int, str]], str]:
    """Write this rank's share of `target` from what `source_ranks` ranks saved in `source`.

    Returns its files with their bytes and xxh64, and why one could not be written ("": all were).
    """
    files = [_optimizer_file(source, number) for number in range(source_ranks)]
    shards = [load_shard(path, mapped=True)["optimizer_state_dict"] for path in files]
    model = load_shard(source / _MODEL, mapped=False)
    writer = ShardWriter()
    writer.begin(background=False)
    for number, (name, group, start, shape) in enumerate(_parameters(model["param_shapes"], source_ranks)):
        if number % world_size == rank:
            for key in ("fp32", "exp_avg", "exp_avg_sq"):
                pieces = [_state(shard, group, key) for shard in shards]
                writer.save(_joined(pieces, start, shape), str(target / "zero" / name / f"{key}.pt"))
    if rank == 0:
        writer.save(_common(shards[0]), str(target / "zero" / "optimizer_state.pt"))
        writer.save(model, str(target / _MODEL))
    return writer.wait()


def _optimizer_file(source: Path, rank: int) -> Path:
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    return next(path for path in (source / name, source / f"bf16_{name}") if path.exists())


def _parameters(groups: list[dict[str, torch.Size]], ranks: int) -> Iterator[tuple[str, int, int, torch.Size]]:
    """Name, group, place in each shard's flat group, shape. A parameter takes as many elements on every rank."""
    for group, shapes in enumerate(groups):
        start = 0
        for name, shape in shapes.items():
            yield name, group, start, shape
            start += math.ceil(shape.numel() / ranks)


def _state(shard: dict[str, Any], group: int, key: str) -> torch.Tensor:
    return shard["fp32_flat_groups"][group] if key == "fp32" else shard["optimizer_state_dict"]["state"][group][key]


def _joined(pieces: list[torch.Tensor], start: int, shape: torch.Size) -> torch.Tensor:
    """The flat parameter (numel,) of its pieces; the last ones may be padded or all padding."""
    length = math.ceil(shape.numel() / len(pieces))
    return torch.cat([piece[start : start + length] for piece in pieces])[: shape.numel()].clone()


def _common(shard: dict[str, Any]) -> dict[str, Any]:
    """A shard without its tensors of parameters."""
    optimizer = shard["optimizer_state_dict"]
    steps = {group: {"step": state["step"].clone()} for group, state in optimizer["state"].items()}
    return {
        **{key: value for key, value in shard.items() if key != "fp32_flat_groups"},
        "optimizer_state_dict": {"state": steps, "param_groups": optimizer["param_groups"]},
    }
