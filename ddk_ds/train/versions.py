"""Versions that a run's numbers depend on."""

from __future__ import annotations

import platform
from importlib.metadata import version

from ddk_ds.version import VERSION

_PACKAGES = ("torch", "deepspeed", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Of Python, this package (which need not be installed) and those that compute."""
    return {
        "python": platform.python_version(),
        "ddk_ds": VERSION,
        **{name: version(name) for name in _PACKAGES},
    }
