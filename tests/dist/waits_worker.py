"""Function that every rank of test_waits.py runs: a run that counts what the host waits for, step by step."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import deepspeed
import torch

import ddk_ds
from ddk_ds.engine.runtime import Runtime
from ddk_ds.train.loop import train
from tests.dist.resume_worker import prepare
from tests.dist.slow_device import SlowDevice

# On a GPU these end all queued work first. What transfers.py reads has come to the host before.
_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
# By the packages' own directories: a clone is called ddk_ds too, and its .venv lies in it.
_OURS, _DEEPSPEED = (f"{Path(package.__path__[0])}/" for package in (ddk_ds, deepspeed))
_READ_ON_THE_HOST = f"{_OURS}engine/transfers.py"


class Waits:
    """Counts, by the place in ddk_ds or DeepSpeed, what the host would wait for the whole device for."""

    def __init__(self, device: SlowDevice) -> None:
        self._device = device
        self._reads: Counter[str] = Counter()
        for name in _READS:
            setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))
        to = torch.Tensor.to

        def copied(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            file = sys._getframe(1).f_code.co_filename
            # DeepSpeed names the device for tensors that are there.
            if not file.startswith(_DEEPSPEED) and any(isinstance(argument, torch.device) for argument in arguments):
                self._note("to", file)
            return to(tensor, *arguments, **options)

        torch.Tensor.to = copied  # type: ignore[method-assign,assignment]

    def take(self) -> dict[str, int]:
        """Return the counts since the last call."""
        taken = {**self._reads, **{name: count for name, count in self._device.waits.items() if name != "event"}}
        self._reads.clear()
        self._device.waits.clear()
        return taken

    def _counted(self, name: str, original: Any) -> Any:
        def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            self._note(name, sys._getframe(1).f_code.co_filename)
            return original(tensor, *arguments, **options)

        return counted

    def _note(self, name: str, file: str) -> None:
        if file.startswith((_OURS, _DEEPSPEED)) and file != _READ_ON_THE_HOST:
            self._reads[f"{name} in {'/'.join(Path(file).parts[-3:])}"] += 1


def count(runtime: Runtime, config_path: str) -> list[dict[str, int]]:
    """Train; return what was counted from each line of the ledger to the next one, in the order of the steps."""
    device = SlowDevice.install()
    run = prepare(runtime, config_path, "counted")
    waits, counts = Waits(device), []
    write = run.ledger.write

    def counted(record: dict[str, Any]) -> None:
        write(record)
        counts.append(waits.take())

    run.ledger.write = counted  # type: ignore[method-assign]
    train(run)
    return counts
