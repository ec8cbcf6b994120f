"""Versions that a run's numbers depend on."""

from __future__ import annotations

import platform
from importlib.metadata import version

_PACKAGES = ("ddk_ds", "torch", "deepspeed", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Of Python and the packages that compute."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
