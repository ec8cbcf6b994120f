"""Collect the wheels that a CUDA machine without network needs in addition to its torch.

python -m tools.bench.wheelhouse --out DIR --python 3.12
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name
from rich import box
from rich.console import Console
from rich.table import Table

from ddk_ds.errors import ConfigError, UserError
from ddk_ds.files import new_directory

ROOT = Path(__file__).resolve().parents[2]
# Packages that the machine is assumed to have: they are large, or depend on the machine's CUDA.
HAVE = (
    *("torch", "torchvision", "triton", "numpy", "transformers", "tokenizers", "safetensors", "huggingface-hub"),
    "pyarrow",
)
# mosaicml-streaming needs these only for clouds and plots, and imports them only then.
LEFT_OUT = (
    *("azure-identity", "azure-storage-blob", "azure-storage-file-datalake", "boto3", "google-cloud-storage", "oci"),
    *("matplotlib", "paramiko"),
)
TEST_TOOLS = ("pytest", "pytest-timeout")
SOURCE_ONLY = ("deepspeed",)  # its index has no wheel
# Older names of the platform tags manylinux_2_N.
LEGACY = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the wheels; new or empty")
    parser.add_argument("--python", default="3.11", help="Python of that machine (default: %(default)s)")
    parser.add_argument(
        "--platform",
        action="append",
        help="newest wheel tag that it accepts, with all older ones of its kind; can be given more than once "
        "(default: manylinux_2_28_x86_64)",
    )
    parser.add_argument(
        "--have",
        nargs="*",
        default=list(HAVE),
        metavar="PACKAGE",
        help="packages that it has, which are not collected with their own dependencies (default: "
        + " ".join(HAVE)
        + ")",
    )
    return parser.parse_args(arguments)


def packages_to_collect(have: Sequence[str], python: str, root: Path = ROOT) -> list[str]:
    """Return `name==version` of each package to collect, sorted by name, with the versions of constraints.txt.

    These are the dependencies of pyproject.toml, the test tools, and the dependencies of both, which are read from the
    packages installed here. Packages in `have` are on the other machine already and are left out; `python` is that
    machine's version of Python.

    Raises:
        ConfigError: a package is not installed here, or constraints.txt does not know its version.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = dict(_pinned(root / "constraints.txt"))
    present = {canonicalize_name(name) for name in (*have, *LEFT_OUT)}
    names: set[str] = set()
    waiting = [canonicalize_name(Requirement(text).name) for text in (*project["dependencies"], *TEST_TOOLS)]
    while waiting:
        name = waiting.pop()
        if name in present or name in names:
            continue
        if name not in versions:
            raise ConfigError(f"constraints.txt has no version of {name}: renew it as its first lines say")
        names.add(name)
        waiting += _needs(name, python)
    return [f"{name}=={versions[name]}" for name in sorted(names)]


def _pinned(constraints: Path) -> Iterator[tuple[str, str]]:
    for line in constraints.read_text(encoding="utf-8").splitlines():
        name, separator, version = line.partition("==")
        if separator and not line.startswith("#"):
            yield canonicalize_name(name), version.strip()


def _needs(name: str, python: str) -> list[NormalizedName]:
    target = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    target |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    try:
        parsed = [Requirement(text) for text in requires(name) or ()]
    except PackageNotFoundError as error:
        raise ConfigError(f"{name} is not installed beside {sys.executable}: run it from .venv (make setup)") from error
    return [canonicalize_name(need.name) for need in parsed if need.marker is None or need.marker.evaluate(target)]


def platform_tags(platforms: Sequence[str]) -> list[str]:
    """Return each platform and, for manylinux_2_N, every older tag, since pip does not add these itself.

    Raises:
        ConfigError: a platform is not a wheel's platform tag.
    """
    tags: list[str] = []
    for platform in platforms:
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)+", platform):
            raise ConfigError(f"--platform {platform}: give a wheel's tag, for example manylinux_2_28_x86_64")
        newest = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", platform)
        if newest is None:
            tags.append(platform)
            continue
        machine = newest[2]
        for minor in range(int(newest[1]), 4, -1):
            tags.append(f"manylinux_2_{minor}_{machine}")
            tags += [f"{LEGACY[minor]}_{machine}"] if minor in LEGACY else []
    return list(dict.fromkeys(tags))


def collect(out: Path, packages: Sequence[str], python: str, tags: Sequence[str]) -> list[Path]:
    """Download or build the wheels of `packages` into `out`, complete or not at all, and return them by name.

    Raises:
        ConfigError: pip failed, or a wheel was built that runs on this machine only.
    """
    with new_directory(out) as partial:
        built = [package for package in packages if package.partition("==")[0] in SOURCE_ONLY]
        ready = [package for package in packages if package not in built]
        target = ["--python-version", python, "--implementation", "cp"]
        target += [part for tag in tags for part in ("--platform", tag)]
        _pip("download", "--no-deps", "--only-binary", ":all:", *target, "--dest", str(partial), *ready)
        if built:
            # Built in this environment, because an isolated one would download torch.
            _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(partial), *built)
        for package in built:
            _check_runs_anywhere(partial, package)
        readme = f"Wheels for Python {python} on {tags[0]}; to install them without network:\n"
        (partial / "README").write_text(f"{readme}{install_line(Path(out.name))}\n", encoding="utf-8")
    return sorted(out.glob("*.whl"))


def install_line(directory: Path) -> str:
    """Return the command that installs the wheels on the other machine, from `directory` there."""
    return f"pip install --no-index --no-deps {directory}/*.whl"


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    # Without this, DeepSpeed's set-up could compile its operators for this machine.
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "DS_BUILD_OPS": "0"}, cwd=ROOT
    )
    if run.returncode:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        reasons = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines
        raise ConfigError(f"pip {arguments[0]} failed: {reasons[-1] if reasons else f'exit code {run.returncode}'}")


def _check_runs_anywhere(directory: Path, package: str) -> None:
    name = package.partition("==")[0].replace("-", "_")
    for wheel in directory.glob(f"{name}-*.whl"):
        if not wheel.stem.endswith("-none-any"):
            raise ConfigError(f"{package} was built as {wheel.name}, for this machine alone: build it on the other one")


def table(wheels: Sequence[Path]) -> Table:
    """Return the table of wheels with their sizes in MB and the sum."""
    total = sum(wheel.stat().st_size for wheel in wheels)
    result = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    result.add_column("wheel", footer=f"{len(wheels)} wheels", overflow="fold")
    result.add_column("MB", justify="right", footer=f"{total / 1e6:.2f}")
    for wheel in wheels:
        result.add_row(wheel.name, f"{wheel.stat().st_size / 1e6:.2f}")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Collect the wheels. Returns the exit code: 0, or 2 after an error that the user can fix."""
    options = parse_arguments(arguments)
    console = Console()
    try:
        if not re.fullmatch(r"3\.\d+", options.python):
            raise ConfigError(f"--python {options.python}: give major and minor version, for example 3.12")
        if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
            raise ConfigError(f"--out {options.out} exists and is not an empty directory; name another")
        tags = platform_tags(options.platform or ["manylinux_2_28_x86_64"])
        packages = packages_to_collect(options.have, options.python)
        with console.status(f"collecting {len(packages)} wheels"):
            wheels = collect(options.out, packages, options.python, tags)
    except UserError as error:
        print(f"wheelhouse: {error}", file=sys.stderr)
        return 2
    console.print(table(wheels))
    console.print(install_line(options.out), highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
