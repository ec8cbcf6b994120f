"""DeepSpeed's ZeRO-3 checkpoint files: written in the background, read one parameter at a time, made universal.

Reading needs no process group, and unpickles tensors and plain values only. The files of a checkpoint are

    <directory>/zero_pp_rank_0_mp_rank_00_model_states.pt              names and shapes, and the run's own state
    <directory>/[bf16_]zero_pp_rank_<rank>_mp_rank_00_optim_states.pt  each rank's slice of every group of parameters

and those of DeepSpeed's universal form, which any number of ranks can load:

    <directory>/zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt          one complete tensor each
    <directory>/zero/optimizer_state.pt                                the part that all shards share
    <directory>/zero_pp_rank_0_mp_rank_00_model_states.pt              as above

DeepSpeed's converter to the universal form works on one machine, writes everything twice and unpickles. Here every
rank writes its share of the parameters directly from the mapped shards; the files are equal
(tests/dist/test_universal.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from ddk_ds.errors import CheckpointError
from ddk_ds.files import size_and_xxh64

# The only classes in DeepSpeed's files, apart from tensors and plain values.
torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum])

MODEL_FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"
# Pages of a mapped file count as this process's memory until the file is closed.
_MAPPED_BYTES = 16 * 2**20


def load_shard(path: Path, *, mapped: bool) -> Any:
    """Return the content of a file, with its tensors on the host. Only tensors and plain values are unpickled.

    With `mapped` a tensor is read from the disk when it is used.
    """
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


class ShardWriter(TorchCheckpointEngine):
    """DeepSpeed's writer of this rank's checkpoint files, which can write in the background and hashes each file.

    DeepSpeed's ranks wait for each other while they save. A rank that raised an error would leave the others waiting;
    so an error is kept, and `wait` returns its message.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []
        self._files: dict[Path, tuple[int, str]] = {}
        self._failure = ""
        self._background = False
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def begin(self, *, background: bool) -> None:
        """Begin a checkpoint. In the background `save` returns as soon as its tensors are copied to the host."""
        self.wait()
        self._files, self._failure, self._background = {}, "", background

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory; DeepSpeed calls this."""
        self.keep_error(super().makedirs, path, exist_ok)

    def keep_error(self, write: Callable[..., None], path: str, *arguments: Any) -> None:
        """Call `write`, which makes `path` or writes there. An error is kept for `wait`."""
        try:
            write(path, *arguments)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError when the disk is full
            self._failure = self._failure or f"{path}: {error}"

    def save(self, state_dict: Any, path: str) -> None:
        """Write `state_dict` to the file `path`; DeepSpeed calls this."""
        if self._background:
            copy = self._on_host(state_dict, Path(path).name, count())
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._pending.append(self._thread.submit(self.keep_error, self._write, path, copy))
        else:
            self.keep_error(self._write, path, state_dict)

    @property
    def pending(self) -> bool:
        """Return True while files are being written in the background."""
        return not all(future.done() for future in self._pending)

    def wait(self) -> tuple[dict[Path, tuple[int, str]], str]:
        """Wait for all files since `begin`; return their bytes and xxh64, and an error message or ""."""
        for future in self._pending:
            future.result()
        self._pending = []
        return self._files, self._failure

    def load(self, path: str, map_location: Any = None) -> Any:
        """Return the content of the file `path`; DeepSpeed calls this."""
        return load_shard(Path(path), mapped=False)

    def _on_host(self, value: Any, file: str, numbers: Iterator[int]) -> Any:
        """Return a copy that training does not change. Its memory is used again: new pages cost more than the copy.

        `numbers` counts the tensors of `file`, to find the memory of the same tensor in the next checkpoint.
        """
        if isinstance(value, torch.Tensor):
            key = file, next(numbers)
            buffer = self._buffers.get(key)
            if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._buffers[key] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {key: self._on_host(item, file, numbers) for key, item in value.items()}
        return [self._on_host(item, file, numbers) for item in value] if isinstance(value, list) else value

    def _write(self, name: str, state_dict: Any) -> None:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            torch.save(state_dict, stream)
            stream.flush()
            os.fsync(stream.fileno())
        self._files[path] = size_and_xxh64(path)


class _Slot(NamedTuple):
    """Position of a parameter in the flat groups of parameters. Each rank holds an equal slice of each group."""

    group: int
    start: int
    """First element of the parameter in a rank's slice; the same on every rank."""
    shape: torch.Size


class ZeroShards:
    """The shards that `ranks` ranks saved in `directory`. Memory holds little more than the tensor being read."""

    def __init__(self, directory: Path, ranks: int) -> None:
        self._files = [_optimizer_file(directory, rank) for rank in range(ranks)]
        self.model_states: dict[str, Any] = load_shard(directory / MODEL_FILE, mapped=False)
        """Content of `MODEL_FILE`; its key "run" is the run's own state."""
        self._slots = _slots(self.model_states["param_shapes"], ranks)
        self._opened: list[dict[str, Any]] = []
        self._read_bytes = 0

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the trained parameters, by their names in the student's root module."""
        return {name: slot.shape for name, slot in self._slots.items()}

    def read(self, name: str, key: str = "fp32", dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return a parameter's master weight, or one of AdamW's moments, as a flat tensor (numel,) of `dtype`.

        `key` is "fp32" for the weight, "exp_avg" or "exp_avg_sq" for a moment. Raises CheckpointError if the shards do
        not contain the parameter, as with optimizer.offload: nvme.
        """
        group, start, shape = self._slots[name]
        tensor = torch.empty(shape.numel(), dtype=dtype)
        # Every rank holds equally many elements of a parameter; on the last ranks some or all of them are padding.
        parts = tensor.split(math.ceil(shape.numel() / len(self._files)))
        for shard, part in zip(self._shards(), parts, strict=False):
            piece = _flat(shard, group, key)
            if len(piece) < start + len(part):
                raise CheckpointError(
                    f"{self._files[0].parent}: the shards lack {name}: with optimizer.offload: nvme they stay on each "
                    "node's disk; the run's own export at its end has the weights"
                )
            part.copy_(piece[start : start + len(part)])
        self._read_bytes += 4 * shape.numel()
        return tensor

    def common(self) -> dict[str, Any]:
        """Return the part that all ranks' shards share: that of rank 0 without weights and moments."""
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


def _optimizer_file(directory: Path, rank: int) -> Path:
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    return next(path for path in (directory / name, directory / f"bf16_{name}") if path.exists())


def _slots(groups: list[dict[str, torch.Size]], ranks: int) -> dict[str, _Slot]:
    slots = {}
    for group, shapes in enumerate(groups):
        start = 0
        for name, shape in shapes.items():
            slots[name] = _Slot(group, start, shape)
            start += math.ceil(shape.numel() / ranks)
    return slots


def _flat(shard: dict[str, Any], group: int, key: str) -> torch.Tensor:
    groups: Any = shard["fp32_flat_groups"] if key == "fp32" else shard["optimizer_state_dict"]["state"]
    tensor: torch.Tensor = groups[group] if key == "fp32" else groups[group][key]
    return tensor.detach()  # saved with checkpoint.in_background: false, masters still ask for gradients


class UniversalShards:
    """The master weights of a universal checkpoint, with the interface of `ZeroShards`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.model_states: dict[str, Any] = load_shard(directory / MODEL_FILE, mapped=False)
        """Content of `MODEL_FILE`; its key "run" is the run's own state."""

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the trained parameters, by their names in the student's root module."""
        return {name: shape for group in self.model_states["param_shapes"] for name, shape in group.items()}

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return a parameter's master weight as (numel,)."""
        tensor: torch.Tensor = load_shard(self._directory / "zero" / name / "fp32.pt", mapped=True)
        return tensor.to(dtype, copy=True)


def write_universal(
    source: Path, target: Path, *, source_ranks: int, rank: int, world_size: int
) -> tuple[dict[Path, tuple[int, str]], str]:
    """Write this rank's share of the universal checkpoint `target` from the shards of `source_ranks` in `source`.

    Returns this rank's files with their bytes and xxh64, and an error message, or "" if all were written.
    """
    shards = ZeroShards(source, source_ranks)
    writer = ShardWriter()
    writer.begin(background=False)
    for number, name in enumerate(shards.shapes):
        if number % world_size == rank:
            for key in ("fp32", "exp_avg", "exp_avg_sq"):
                writer.save(shards.read(name, key), str(target / "zero" / name / f"{key}.pt"))
    if rank == 0:
        writer.save(shards.common(), str(target / "zero" / "optimizer_state.pt"))
        writer.save(shards.model_states, str(target / MODEL_FILE))
    return writer.wait()
