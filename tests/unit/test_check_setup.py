"""The check before the installation prints one line for each missing thing, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tools import check_setup

SCRIPT = Path(check_setup.__file__)


def test_nothing_is_missing_where_the_tests_run() -> None:
    assert check_setup.missing(check_setup.ROOT) == []


def test_a_missing_compiler_is_one_line() -> None:
    environment = {**os.environ, "CXX": "no-such-compiler"}
    run = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.splitlines() == [
        "set-up: a C++ compiler is missing (no-such-compiler is not on PATH): apt-get install g++"
    ]


def test_an_old_python_is_named() -> None:
    assert check_setup.check_python((3, 11, 0)) == []
    (fault,) = check_setup.check_python((3, 9, 2))
    assert "Python 3.11 or newer" in fault
    assert "is 3.9" in fault


def test_missing_headers_are_named(tmp_path: Path) -> None:
    (fault,) = check_setup.check_headers(tmp_path)
    assert "apt-get install python3-dev" in fault
    (tmp_path / "Python.h").touch()
    assert check_setup.check_headers(tmp_path) == []


def test_too_little_space_is_named(tmp_path: Path) -> None:
    (fault,) = check_setup.check_space(tmp_path, 10**18, "free some")
    assert str(tmp_path) in fault
    assert check_setup.check_space(tmp_path, 1, "free some") == []
