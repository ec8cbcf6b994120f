"""DeepSpeed's checkpoint files: copied at once, written and hashed while training goes on; read without unpickling."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from ddk_ds.files import size_and_xxh64

# All that DeepSpeed's files hold beside tensors and plain values.
torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum])


class ShardWriter(TorchCheckpointEngine):
    """Writes this rank's files. DeepSpeed's ranks meet while they save: one that raised would leave the others."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []
        self._files: dict[Path, tuple[int, str]] = {}
        self._failure = ""
        self._background = False
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def begin(self, *, background: bool) -> None:
        """A checkpoint begins. In the background: the caller goes on as soon as tensors are copied to the host."""
        self.wait()
        self._files, self._failure, self._background = {}, "", background

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file."""
        if self._background:
            copy = self._on_host(state_dict, Path(path).name, count())
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._pending.append(self._thread.submit(self._write, copy, Path(path)))
        else:
            self._write(state_dict, Path(path))

    @property
    def busy(self) -> bool:
        """Whether files are still being written."""
        return not all(future.done() for future in self._pending)

    def wait(self) -> tuple[dict[Path, tuple[int, str]], str]:
        """The files since `begin` with bytes and xxh64, when all are on the disk; why one could not be, or ""."""
        for future in self._pending:
            future.result()
        self._pending = []
        return self._files, self._failure

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file."""
        return load_shard(Path(path), mapped=False)

    def _on_host(self, value: Any, file: str, numbers: Iterator[int]) -> Any:
        """A copy that training does not change. Its memory is kept: fresh pages cost more than the copy."""
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

    def _write(self, state_dict: Any, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as stream:
                torch.save(state_dict, stream)
                stream.flush()
                os.fsync(stream.fileno())
            self._files[path] = size_and_xxh64(path)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError where the disk is full
            self._failure = f"{path}: {error}"


def load_shard(path: Path, *, mapped: bool) -> Any:
    """What a file holds, on the host: tensors and plain values, no other object is unpickled.

    Mapped: a tensor is read from the disk where it is used.
    """
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
