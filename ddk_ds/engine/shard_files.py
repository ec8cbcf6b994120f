"""DeepSpeed's checkpoint files: written whole and hashed, a failure noted instead of raised."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from ddk_ds.files import size_and_xxh64


class ShardWriter(TorchCheckpointEngine):
    """Writes this rank's files. DeepSpeed's ranks meet while they save: one that raised would leave the others."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[Path, tuple[int, str]] = {}
        """What was written since `begin`: bytes and xxh64."""
        self.failure: str | None = None
        """Why a file could not be written, since `begin`."""

    def begin(self) -> None:
        """Forget the last checkpoint."""
        self.files, self.failure = {}, None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write one file down to the disk; see `failure`."""
        try:
            with open(path, "wb") as stream:
                torch.save(state_dict, stream)
                stream.flush()
                os.fsync(stream.fileno())
            self.files[Path(path)] = size_and_xxh64(Path(path))
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError where the disk is full
            self.failure = f"{path}: {error}"
