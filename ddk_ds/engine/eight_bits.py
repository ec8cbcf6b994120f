"""The number formats of `teacher.quantize`: which weights take them, and which devices multiply in them. No model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ddk_ds.config.sections import Teacher
from ddk_ds.errors import ConfigError

FP8_CAPABILITY = (8, 9)
"""CUDA compute capability from which torch._scaled_mm multiplies in FP8: Ada, Hopper and later."""


@dataclass(frozen=True)
class Format:
    """An eight-bit number format of weights."""

    dtype: torch.dtype
    largest: float
    """Its largest number, which the largest element of a row becomes."""
    multiple: int
    """Number of which both sides of a linear layer's matrix must be multiples."""

    def fits(self, shape: Sequence[int], item_bytes: int) -> bool:
        """Return True if a weight of this shape can be stored, its rows as whole elements of `item_bytes` bytes."""
        return shape[-1] % item_bytes == 0 and (len(shape) != 2 or all(side % self.multiple == 0 for side in shape))


FORMATS = {"int8": Format(torch.int8, 127, 1), "fp8": Format(torch.float8_e4m3fn, 448, 16)}
"""The formats by the values of `teacher.quantize`."""


def skipped_layers(section: Teacher, count: int) -> frozenset[int]:
    """Return the numbers, from 0, of those of the teacher's `count` layers that are not quantized.

    Raises ConfigError if `quantize_skip_layers` names one that the teacher does not have.
    """
    wrong = [number for number in section.quantize_skip_layers if not -count <= number < count]
    if wrong:
        raise ConfigError(
            f"teacher.quantize_skip_layers names layer {wrong[0]}: the teacher's are 0 to {count - 1}, or -{count} to "
            "-1 from the end"
        )
    return frozenset(number % count for number in section.quantize_skip_layers)


def fp8_fault(section: Teacher | None, device: torch.device) -> str:
    """Return why `device` cannot compute a teacher in FP8; "" if it can or need not. A CPU can, slowly."""
    if section is None or section.quantize != "fp8" or device.type != "cuda":
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= FP8_CAPABILITY:
        return ""
    return (
        f"teacher.quantize: fp8: {torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, FP8 "
        f"products need {'.'.join(map(str, FP8_CAPABILITY))} (Ada, Hopper or later)"
    )
