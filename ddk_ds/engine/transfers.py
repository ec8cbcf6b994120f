"""Copies between the host and the device for which the host does not wait: a plain copy ends all queued work first."""

from __future__ import annotations

from typing import TypeVar

import torch

Given = TypeVar("Given", torch.Tensor, torch.Tensor | None)


def to_device(tensor: Given, device: torch.device) -> Given:
    """Return the tensor, or None, on the device, where it is when work that is queued from now on needs it."""
    if tensor is None or tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor on the host, which is complete when the device has come to it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Begin to copy; the host goes on."""
        self._event = torch.cuda.Event() if tensor.is_cuda else None
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) if tensor.is_cuda else tensor
        if self._event is not None:
            self._copy.copy_(tensor, non_blocking=True)
            self._event.record()

    def read(self) -> list[float]:
        """Return the numbers, and wait for them if the device has not come to the copy."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._copy.tolist()
        return values
