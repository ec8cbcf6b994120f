"""Packages of Debian, PyPI and npm, downloaded by their own clients and unpacked without being installed.

Nothing of a package is run: `.deb` files are unpacked by dpkg, wheels and npm's tarballs by Python.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from ddk_ds.errors import ConfigError, DataError
from ddk_ds.files import new_directory

CLIENT_SECONDS = 1800.0
CLIENTS = {
    "apt-get": "it is there on Debian and its derivatives alone",
    "dpkg": "it is there on Debian and its derivatives alone",
    "npm": "apt-get install npm",
}


@dataclass(frozen=True)
class Package:
    """`debian:NAME` (the release's version), `pypi:NAME==VERSION` or `npm:NAME@VERSION`."""

    kind: str
    name: str
    version: str | None

    def __str__(self) -> str:
        mark = {"pypi": "==", "npm": "@"}.get(self.kind, "")
        return f"{self.kind}:{self.name}{mark}{self.version or ''}"


@dataclass(frozen=True)
class Unpacked:
    """A package's files below `root`, and the version that they are."""

    root: Path
    version: str


def parse_package(text: str) -> Package:
    """A package as it is written in a list. Raises ConfigError."""
    kind, _, rest = text.partition(":")
    name, mark, version = rest.partition({"debian": "\0", "pypi": "==", "npm": "@"}.get(kind, ":"))
    plain = all(part and part[0].isalnum() and not set(part) - _NAME for part in ([name, version] if mark else [name]))
    if kind not in ("debian", "pypi", "npm") or not plain or (kind != "debian" and not mark):
        raise ConfigError(f"package {text!r}: write it as debian:NAME, pypi:NAME==VERSION or npm:NAME@VERSION")
    return Package(kind, name, version or None)


_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.+-_~")


class PackageStore:
    """A directory of unpacked packages, `KIND/NAME@VERSION`; what is there is not downloaded again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, package: Package) -> Unpacked:
        """The package, downloaded if need be.

        Raises:
            DataError: a client is missing, or the package cannot be had or unpacked; names the package and why.
        """
        place = self._directory / package.kind
        for found in sorted(place.glob(f"{package.name}@*")):
            version = found.name.partition("@")[2]
            if package.version in (None, version):
                return Unpacked(found, version)
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=place) as download:
            archive = _download(package, Path(download))
            version = package.version or unquote(archive.name.split("_")[1])
            final = place / f"{package.name}@{version}"
            with new_directory(final) as tree:
                try:
                    _unpack(package, archive, tree)
                except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
                    raise DataError(f"{package}: {archive.name} cannot be unpacked: {error}") from error
        return Unpacked(final, version)


def _download(package: Package, place: Path) -> Path:
    """Let the registry's client fetch the package's one archive into `place`."""
    if package.kind == "debian":
        run_client(["apt-get", "--quiet", "download", package.name], package, place)
    elif package.kind == "npm":
        run_client(["npm", "pack", "--silent", f"{package.name}@{package.version}"], package, place)
    else:
        if importlib.util.find_spec("pip") is None:
            raise DataError(f"{package} needs pip: {sys.executable} -m ensurepip")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        run_client([*command, f"{package.name}=={package.version}"], package, place)
    archives = [path for path in place.iterdir() if path.suffix in (".deb", ".whl", ".tgz")]
    if len(archives) != 1:
        raise DataError(f"{package}: its client left {len(archives)} archives, not one; try again")
    return archives[0]


def _unpack(package: Package, archive: Path, tree: Path) -> None:
    if package.kind == "debian":
        run_client(["dpkg", "-x", str(archive), str(tree)], package, tree)
    elif package.kind == "pypi":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(tree)
    else:
        with tarfile.open(archive) as tarball:
            tarball.extractall(tree, filter="data")


def run_client(command: Sequence[str], package: Package, directory: Path) -> None:
    """Run a registry's client in `directory`, quietly. Raises DataError with its first line of error."""
    if shutil.which(command[0]) is None:
        raise DataError(f"{package} needs {command[0]}, which is not here: {CLIENTS[command[0]]}")
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=CLIENT_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"{package}: {command[0]} did not end in {CLIENT_SECONDS:.0f} s; try again") from None
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("E:", "ERROR:", "npm ERR!", "npm error", "dpkg"))]
        why = (errors or lines or [f"exit code {done.returncode}"])[0]
        hint = "; apt-get update first, or take a package of this release" if "Unable to locate" in why else ""
        raise DataError(f"{package} cannot be fetched: {why}{hint}")
