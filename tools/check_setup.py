"""Check that this machine has what the installation needs. Runs with any Python from 3.7 on.

    python3 tools/check_setup.py

Prints a line for each thing that is missing and exits with 1; prints nothing and exits with 0 if nothing is missing.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 11)
# 7 GB in uv's cache, to which the files of .venv are links where both are on one disk
INSTALL_BYTES = 8 * 10**9
# The extension that DeepSpeed compiles maps one file of 66 MiB for each rank; Docker gives /dev/shm 64 MB.
SHARED_MEMORY_BYTES = 200 * 10**6


def check_python(version: tuple[int, ...]) -> list[str]:
    """Return a fault if an interpreter of this version is too old."""
    if version >= MIN_PYTHON:
        return []
    found, wanted = (".".join(map(str, numbers[:2])) for numbers in (version, MIN_PYTHON))
    return [f"Python {wanted} or newer is needed, {sys.executable} is {found}: name another by make PYTHON=..."]


def check_venv() -> list[str]:
    """Return a fault if venv or ensurepip is missing; Debian has them in a package of their own."""
    if find_spec("venv") and find_spec("ensurepip"):
        return []
    return ["Python's venv and ensurepip are missing: apt-get install python3-venv"]


def check_headers(directory: Path) -> list[str]:
    """Return a fault if `directory` lacks Python's C headers."""
    if (directory / "Python.h").is_file():
        return []
    return [f"Python's C headers are missing ({directory}/Python.h): apt-get install python3-dev"]


def check_compiler(command: str) -> list[str]:
    """Return a fault if the C++ compiler, which builds DeepSpeed's extension, is missing."""
    if shutil.which(command):
        return []
    return [f"a C++ compiler is missing ({command} is not on PATH): apt-get install g++"]


def check_space(directory: Path, needed_bytes: int, fix: str) -> list[str]:
    """Return a line if the disk of `directory` has less free space than needed; it ends with the advice `fix`.

    The list is empty if there is enough space or no such directory.
    """
    if not directory.is_dir():
        return []
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes >= needed_bytes:
        return []
    return [f"{directory} has {free_bytes / 1e9:.1f} GB free, {needed_bytes / 1e9:.1f} GB are needed: {fix}"]


def missing(root: Path) -> list[str]:
    """Return a line for each thing that is missing to install and run the project in `root`."""
    faults = [
        *check_python(tuple(sys.version_info[:3])),
        *check_venv(),
        *check_headers(Path(sysconfig.get_path("include"))),
        *check_compiler(os.environ.get("CXX", "c++")),
        *check_space(Path("/dev/shm"), SHARED_MEMORY_BYTES, "free some, or start the container with --shm-size=1g"),
    ]
    if not (root / ".venv").exists():
        faults += check_space(root, INSTALL_BYTES, "free some")
        home = Path(os.environ.get("UV_CACHE_DIR", os.environ.get("XDG_CACHE_HOME", Path.home())))
        if home.is_dir() and home.stat().st_dev != root.stat().st_dev:
            faults += check_space(home, INSTALL_BYTES, "free some, or name another place by UV_CACHE_DIR=...")
    return faults


def main() -> int:
    """Run all checks. Returns the exit code: 0, or 1 if anything is missing."""
    faults = missing(ROOT)
    for fault in faults:
        print(f"set-up: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
