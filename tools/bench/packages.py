"""Packages of Debian, PyPI and npm, downloaded by their own clients and unpacked without being installed.

No code of a package is run: dpkg unpacks `.deb` files, Python unpacks wheels and npm's tarballs.
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
    "apt-get": "only Debian and its derivatives have it",
    "dpkg": "only Debian and its derivatives have it",
    "npm": "apt-get install npm",
}


@dataclass(frozen=True)
class Package:
    """A package: `debian:NAME` (in the release's version), `pypi:NAME==VERSION` or `npm:NAME@VERSION`."""

    kind: str
    name: str
    version: str | None

    def __str__(self) -> str:
        mark = {"pypi": "==", "npm": "@"}.get(self.kind, "")
        return f"{self.kind}:{self.name}{mark}{self.version or ''}"


@dataclass(frozen=True)
class Unpacked:
    """An unpacked package: the directory of its files, and its version."""

    root: Path
    version: str


def parse_package(text: str) -> Package:
    """Parse a package's name in a list. Raises ConfigError if it has none of the three forms."""
    kind, _, rest = text.partition(":")
    name, mark, version = rest.partition({"debian": "\0", "pypi": "==", "npm": "@"}.get(kind, ":"))
    plain = all(part and part[0].isalnum() and not set(part) - _NAME for part in ([name, version] if mark else [name]))
    if kind not in ("debian", "pypi", "npm") or not plain or (kind != "debian" and not mark):
        raise ConfigError(f"package {text!r}: write it as debian:NAME, pypi:NAME==VERSION or npm:NAME@VERSION")
    return Package(kind, name, version or None)


_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.+-_~")


class PackageStore:
    """A directory of unpacked packages, `KIND/NAME@VERSION`; each is downloaded only once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.absolute()  # clients run in directories of their own

    def get(self, package: Package) -> Unpacked:
        """Return the unpacked package; download it if the store lacks it.

        Raises:
            DataError: a client is missing, or the package cannot be downloaded or unpacked.
        """
        directory = self._directory / package.kind
        for tree in sorted(directory.glob(f"{package.name}@*")):
            version = tree.name.partition("@")[2]
            if package.version in (None, version):
                return Unpacked(tree, version)
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=directory) as download:
            archive = _download(package, Path(download))
            version = package.version or unquote(archive.name.split("_")[1])
            final = directory / f"{package.name}@{version}"
            with new_directory(final) as tree:
                try:
                    _unpack(package, archive, tree)
                except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
                    raise DataError(f"{package}: {archive.name} cannot be unpacked: {error}") from error
        return Unpacked(final, version)


def _download(package: Package, directory: Path) -> Path:
    """Download the package's archive into `directory` by the registry's client, and return its path."""
    if package.kind == "debian":
        run_client(["apt-get", "--quiet", "download", package.name], package, directory)
    elif package.kind == "npm":
        run_client(["npm", "pack", "--silent", f"{package.name}@{package.version}"], package, directory)
    else:
        if importlib.util.find_spec("pip") is None:
            raise DataError(f"{package} needs pip: {sys.executable} -m ensurepip")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        run_client([*command, f"{package.name}=={package.version}"], package, directory)
    archives = [path for path in directory.iterdir() if path.suffix in (".deb", ".whl", ".tgz")]
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
    """Run a registry's client in `directory`. Raises DataError with its first error message."""
    if shutil.which(command[0]) is None:
        raise DataError(f"{package} needs {command[0]}, which is not installed: {CLIENTS[command[0]]}")
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=CLIENT_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"{package}: {command[0]} did not end in {CLIENT_SECONDS:.0f} s; try again") from None
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("E:", "ERROR:", "npm ERR!", "npm error", "dpkg"))]
        reason = (errors or lines or [f"exit code {done.returncode}"])[0]
        hint = "; apt-get update first, or take a package of this release" if "Unable to locate" in reason else ""
        raise DataError(f"{package} cannot be fetched: {reason}{hint}")
