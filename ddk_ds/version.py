"""The version of the project.

Versions that a run's numbers depend on.
"""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

VERSION = "0.1.0"


def commit() -> str | None:
    """The commit that this checkout is at, "-dirty" behind it where files differ; None where it is no checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    place = Path(__file__).resolve().parents[1]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=False).stdout.strip() or None


_PACKAGES = ("torch", "deepspeed", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Of Python, this package (which need not be installed) and those that compute."""
    return {
        "python": platform.python_version(),
        "ddk_ds": VERSION,
        **{name: version(name) for name in _PACKAGES},
    }
