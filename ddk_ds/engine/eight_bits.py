"""The number formats of `teacher.quantize`: which weights take them, and which devices multiply in them. No model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ddk_ds.config.sections import Teacher
from ddk_ds.errors import ConfigError

LEAST_SHARE = 0.5
"""Share of the layers' weights that must be quantized: what is left would otherwise take the memory as before."""
CAPABILITIES = {"fp8": (8, 9), "int8_dynamic": (8, 0)}
"""CUDA compute capability from which a GPU multiplies in a format: FP8 from Ada and Hopper on, int8 from Ampere on."""


@dataclass(frozen=True)
class Format:
    """An eight-bit number format of weights."""

    dtype: torch.dtype
    largest: float
    """Its largest number, which the largest element of a row becomes."""
    multiple: int = 1
    """Number of which both sides of a linear layer's matrix must be multiples."""
    rounds_inputs: bool = False
    """True if linear layers round their inputs too, and multiply in 8 bits."""
    longest: int | None = None
    """Largest number of a linear layer's inputs whose products have a sum without overflow; None: any."""

    def fits(self, shape: Sequence[int], item_bytes: int) -> bool:
        """Return True if a weight of this shape can be stored, its rows as whole elements of `item_bytes` bytes."""
        if len(shape) != 2:
            return shape[-1] % item_bytes == 0
        multiples = all(side % self.multiple == 0 for side in shape)
        return multiples and shape[-1] % item_bytes == 0 and shape[-1] <= (self.longest or shape[-1])


FORMATS = {
    "int8": Format(torch.int8, 127),
    "int8_dynamic": Format(torch.int8, 127, 8, rounds_inputs=True, longest=(2**31 - 1) // 127**2),
    "fp8": Format(torch.float8_e4m3fn, 448, 16, rounds_inputs=True),
}
"""The formats by the values of `teacher.quantize`. Multiples are what torch's products ask for on CUDA."""


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


def product_fault(section: Teacher | None, device: torch.device) -> str:
    """Return why `device` cannot multiply in the teacher's 8 bits; "" if it can or need not. A CPU can, slowly."""
    needed = CAPABILITIES.get("none" if section is None else section.quantize)
    if section is None or needed is None or device.type != "cuda":
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= needed:
        return ""
    what, which = ("FP8", "Ada, Hopper") if section.quantize == "fp8" else ("int8", "Ampere")
    return (
        f"teacher.quantize: {section.quantize}: {torch.cuda.get_device_name(device)} has compute capability "
        f"{major}.{minor}, {what} products need {'.'.join(map(str, needed))} ({which} or later)"
    )
