"""DeepSpeed's ZeRO-3 checkpoint files: written in the background, read by ranges of elements.

Reading needs no process group, and unpickles tensors and plain values only. The files of a checkpoint are

    <directory>/zero_pp_rank_0_mp_rank_00_model_states.pt              names and shapes, and the run's own state
    <directory>/[bf16_]zero_pp_rank_<rank>_mp_rank_00_optim_states.pt  each rank's slice of every group of parameters

torch.save stores a tensor's bytes in one piece, without compression. So the place of any elements in a file is known
from the file's directory, and they are read alone, by pread: a mapped file would be read page by page over a network,
and its pages would count as this process's memory.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_MOMENTS = ("exp_avg", "exp_avg_sq")
_BUFFER_BYTES = 4 * 2**20  # of one read, before its elements are converted


def load_shard(path: Path) -> Any:
    """Return the content of a file, with its tensors on the host. Only tensors and plain values are unpickled."""
    return torch.load(path, map_location="cpu", weights_only=True)


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
        return load_shard(Path(path))

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
    """The shards that `ranks` ranks saved in `directory`. A file is opened when the first of its elements is read."""

    def __init__(self, directory: Path, ranks: int) -> None:
        self._files = [_optimizer_file(directory, rank) for rank in range(ranks)]
        self.model_states: dict[str, Any] = load_shard(directory / MODEL_FILE)
        """Content of `MODEL_FILE`; its key "run" is the run's own state."""
        self._slots = _slots(self.model_states["param_shapes"], ranks)
        self._opened: dict[int, _Shard] = {}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the trained parameters, by their names in the student's root module."""
        return {name: slot.shape for name, slot in self._slots.items()}

    def read(self, name: str, key: str = "fp32", dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return a parameter's master weight, or one of AdamW's moments, as a flat tensor (numel,) of `dtype`.

        `key` is "fp32" for the weight, "exp_avg" or "exp_avg_sq" for a moment. Raises CheckpointError as `read_into`.
        """
        tensor = torch.empty(self._slots[name].shape.numel(), dtype=dtype)
        self.read_into(tensor, name, key, 0)
        return tensor

    def read_into(self, target: torch.Tensor, name: str, key: str, first: int) -> None:
        """Fill `target` (n,) with the elements of a parameter from number `first` on; `key` is that of `read`.

        Raises CheckpointError if the shards do not contain the parameter, as with optimizer.offload: nvme, or are cut
        short.
        """
        group, start, shape = self._slots[name]
        # Every rank holds equally many elements of a parameter; on the last ranks some or all of them are padding.
        size = math.ceil(shape.numel() / len(self._files))
        while len(target):
            rank, place = divmod(first, size)
            part = target[: size - place]
            shard = self._shard(rank)
            saved = _flat(shard.content, group, key)
            if len(saved) < start + place + len(part):
                raise CheckpointError(
                    f"{self._files[0].parent}: the shards lack {name}: with optimizer.offload: nvme they stay on each "
                    "node's disk; the run's own export at its end has the weights"
                )
            shard.read_into(part, saved, start + place)
            target, first = target[len(part) :], first + len(part)

    def resized(
        self, groups: Sequence[Mapping[str, torch.Size]], options: Sequence[int], rank: int, ranks: int
    ) -> dict[str, Any]:
        """Return what rank `rank` of `ranks` would have saved as the state of its optimizer. Padding is zero.

        Reads hardly more bytes than it returns. Raises CheckpointError as `read_into`.

        Args:
            groups: the shapes of the parameters, by name, in each of the rank's groups.
            options: number of the set of AdamW's options that each group has.
        """
        content = self._shard(0).content
        optimizer = content["optimizer_state_dict"]
        step = torch.empty(1)
        self._shard(0).read_into(step, optimizer["state"][0]["step"], 0)
        flat = {key: [self._slice(shapes, key, rank, ranks) for shapes in groups] for key in ("fp32", *_MOMENTS)}
        state = {
            group: {"step": step[0].clone(), **{key: flat[key][group] for key in _MOMENTS}}
            for group in range(len(groups))
        }
        param_groups = [
            {**values, "params": [group for group, own in enumerate(options) if own == number]}
            for number, values in enumerate(optimizer["param_groups"])
        ]
        return {
            **content,
            "fp32_flat_groups": flat["fp32"],
            "optimizer_state_dict": {"state": state, "param_groups": param_groups},
        }

    def _slice(self, shapes: Mapping[str, torch.Size], key: str, rank: int, ranks: int) -> torch.Tensor:
        """Return the elements of a group of parameters that rank `rank` of `ranks` holds, as (n,)."""
        sizes = [math.ceil(shape.numel() / ranks) for shape in shapes.values()]
        flat = torch.zeros(sum(sizes))
        for (name, shape), part in zip(shapes.items(), flat.split(sizes), strict=True):
            first = min(rank * len(part), shape.numel())
            self.read_into(part[: shape.numel() - first], name, key, first)
        return flat

    def _shard(self, rank: int) -> _Shard:
        if rank not in self._opened:
            self._opened[rank] = _Shard(self._files[rank])
        return self._opened[rank]


class _Shard:
    """One rank's file, open for reading."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("rb", buffering=0)
        weakref.finalize(self, self._stream.close)
        # On the device "meta" a tensor has no content, and its storage knows its place in the file.
        read: Any = torch.load(self._stream, map_location="meta", weights_only=True)
        self.content: dict[str, Any] = read["optimizer_state_dict"]

    def read_into(self, target: torch.Tensor, saved: torch.Tensor, first: int) -> None:
        """Fill `target` (n,) with the elements of `saved`, a tensor of `content`, from number `first` on."""
        storage: Any = saved.untyped_storage()
        place = storage._checkpoint_offset + saved.element_size() * (saved.storage_offset() + first)
        for part in target.split(_BUFFER_BYTES // saved.element_size()):
            buffer = torch.empty(len(part), dtype=saved.dtype)
            left = buffer.view(torch.uint8).numpy().data
            while left:
                read = os.preadv(self._stream.fileno(), [left], place)
                if not read:
                    raise CheckpointError(f"{self._path} is cut short")
                left, place = left[read:], place + read
            part.copy_(buffer)


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
    return tensor
