"""The Dockerfiles pass a linter, and install what the set-up asks for.

No test builds them: that takes a base image from a registry of images, and minutes.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tools import check_setup

ROOT = Path(__file__).resolve().parents[2]
FILES = ("Dockerfile", "Dockerfile.cuda")


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return each instruction's name and arguments, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in joined)]


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    """Run the linter on a Dockerfile's text."""
    program = Path(sys.executable).with_name("hadolint")
    return subprocess.run([program, "--no-color", "-"], input=text, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", FILES)
def test_the_linter_finds_nothing(name: str) -> None:
    done = hadolint((ROOT / name).read_text())
    assert done.returncode == 0, done.stdout
    assert hadolint((ROOT / name).read_text() + "COPY one two three\n").returncode != 0


def test_the_image_has_what_the_set_up_asks_for() -> None:
    """Its packages are those that check_setup.py names, its installation is the Makefile's, and PATH leads to it."""
    steps = instructions(ROOT / "Dockerfile")
    installed = {word for name, text in steps if name == "RUN" and "apt-get install" in text for word in text.split()}
    named = {
        fault.rpartition("apt-get install ")[2]
        for fault in (
            *check_setup.check_headers(Path("/none")),
            *check_setup.check_compiler("no-such-compiler"),
            "apt-get install python3-venv",
        )
    }
    assert named | {"make"} <= installed
    assert ("COPY", ". .") in steps and [text for name, text in steps if name == "RUN" and text.endswith(" make setup")]
    folder = dict(steps)["WORKDIR"]
    assert dict(steps)["ENV"].startswith(f"PATH={folder}/.venv/bin:")
    assert dict(steps)["CMD"] == '["make", "demo"]' and "\ndemo:" in (ROOT / "Makefile").read_text()


def test_the_image_for_gpus_is_the_same_installation() -> None:
    """It begins with the first image and installs no Python package of its own."""
    steps = instructions(ROOT / "Dockerfile.cuda")
    assert steps[:2] == [("ARG", "BASE=ddk"), ("FROM", "${BASE}")]
    assert not [text for name, text in steps if name == "RUN" and "pip" in text]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert dict(steps)["CMD"] == '["ddk", "--help"]' and "ddk" in scripts


def test_nothing_built_or_private_is_copied() -> None:
    left_out = (ROOT / ".dockerignore").read_text().split()
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    assert {".git", *(name for name in ignored if "*" not in name and "cache" not in name)} <= set(left_out)
