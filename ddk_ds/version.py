"""The version of the project."""

from __future__ import annotations

import subprocess
from pathlib import Path

VERSION = "0.1.0"


def commit() -> str | None:
    """The commit that this checkout is at, "-dirty" behind it where files differ; None where it is no checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    place = Path(__file__).resolve().parents[1]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=False).stdout.strip() or None
