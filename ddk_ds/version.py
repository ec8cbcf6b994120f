"""Versions of this project, of its checkout and of the packages that a run's numbers depend on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

VERSION = "0.1.0"
_PACKAGES = ("torch", "deepspeed", "transformers", "numpy")


def commit() -> str | None:
    """Return the commit of this checkout, followed by "-dirty" if files differ from it; None outside of a checkout.

    A package that is installed somewhere below another project's checkout has none.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip() or None


def versions() -> dict[str, str]:
    """Return by name the versions of Python, of this package (which need not be installed) and of `_PACKAGES`."""
    return {
        "python": platform.python_version(),
        "ddk_ds": VERSION,
        **{name: version(name) for name in _PACKAGES},
    }
