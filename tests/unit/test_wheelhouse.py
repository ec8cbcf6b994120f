"""The wheelhouse's errors, list of packages and calls of pip; nothing is downloaded."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from ddk_ds.errors import ConfigError
from tools.bench import wheelhouse


class Pip:
    """A replacement of pip that records commands, makes empty wheels, and fails on request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str = "", tag: str = "py3-none-any") -> None:
        self.commands: list[list[str]] = []
        self._fails, self._tag = fails, tag
        monkeypatch.setattr(wheelhouse.subprocess, "run", self._run)

    def _run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        arguments = command[4:]
        self.commands.append(arguments)
        if arguments[0] == self._fails:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: no such wheel\n")
        place = Path(arguments[arguments.index("--dest" if arguments[0] == "download" else "--wheel-dir") + 1])
        for package in (argument for argument in arguments if "==" in argument):
            name, _, version = package.partition("==")
            (place / f"{name.replace('-', '_')}-{version}-{self._tag}.whl").write_bytes(b"x" * 1000)
        return subprocess.CompletedProcess(command, 0, "", "")


def names(packages: list[str]) -> set[str]:
    return {package.partition("==")[0] for package in packages}


def test_the_list_is_what_the_project_needs_beside_what_is_there() -> None:
    packages = wheelhouse.packages_to_collect(wheelhouse.HAVE, "3.12")
    constraints = (wheelhouse.ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    assert set(packages) <= set(constraints)
    collected = names(packages)
    direct = {"deepspeed", "mosaicml-streaming", "omegaconf", "pydantic", "rich", "pytest", "pytest-timeout"}
    indirect = {"hjson", "msgpack", "py-cpuinfo", "einops", "ninja", "zstd", "brotli", "cramjam", "pydantic-core"}
    assert direct | indirect <= collected
    assert not collected & {*wheelhouse.HAVE, *wheelhouse.LEFT_OUT}
    assert not collected & {"botocore", "cryptography", "sympy", "regex"}  # needed by those alone
    assert not any(name.startswith("nvidia-") for name in collected)


def test_a_package_that_is_there_goes_with_what_only_it_needs() -> None:
    collected = names(wheelhouse.packages_to_collect([*wheelhouse.HAVE, "rich", "pytest"], "3.12"))
    assert not collected & {"rich", "markdown-it-py", "mdurl", "pytest", "iniconfig"}
    assert {"pluggy", "pygments"} & collected == set()
    assert "pyarrow" in names(
        wheelhouse.packages_to_collect([name for name in wheelhouse.HAVE if name != "pyarrow"], "3.12")
    )


def test_a_version_that_is_not_pinned_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["rich>=13"]\n')
    (tmp_path / "constraints.txt").write_text("pytest==9.2.0\n")
    with pytest.raises(ConfigError, match=r"constraints\.txt has no version of"):
        wheelhouse.packages_to_collect(wheelhouse.HAVE, "3.12", tmp_path)


def test_older_platforms_are_named_too() -> None:
    tags = wheelhouse.platform_tags(["manylinux_2_18_x86_64", "linux_x86_64"])
    assert tags[:3] == ["manylinux_2_18_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]
    assert {"manylinux_2_5_x86_64", "manylinux1_x86_64", "linux_x86_64"} <= set(tags)
    assert "manylinux_2_28_x86_64" not in tags


def test_wheels_are_collected_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip = Pip(monkeypatch)
    out = tmp_path / "wheels"
    out.mkdir()
    assert wheelhouse.main(["--out", str(out), "--python", "3.12"]) == 0
    download, build = pip.commands
    assert download[download.index("--python-version") + 1] == "3.12"
    assert [argument for argument in build if "==" in argument] == ["deepspeed==0.19.8"]
    assert "--no-deps" in download and "--no-deps" in build
    wheels = list(out.glob("*.whl"))
    assert len(wheels) == len(wheelhouse.packages_to_collect(wheelhouse.HAVE, "3.12"))
    assert (out / "README").read_text().splitlines()[1] == "pip install --no-index --no-deps wheels/*.whl"
    assert f"{len(wheels)} wheels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--python", "3"], "--python 3: give major and minor version"),
        (["--platform", "x86"], "--platform x86: give a wheel's tag"),
        (["--out", str(Path(__file__).parent)], "exists and is not an empty directory"),
        (["--out", __file__], "exists and is not an empty directory"),
    ],
)
def test_bad_arguments_are_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wheelhouse.main(["--out", str(tmp_path / "wheels"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wheelhouse: ")
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("pip", "message"),
    [
        ({"fails": "download"}, "pip download failed: no such wheel"),
        ({"fails": "wheel"}, "pip wheel failed: no such wheel"),
        ({"tag": "cp311-cp311-linux_x86_64"}, "deepspeed==0.19.8 was built as deepspeed-0.19.8-cp311"),
    ],
)
def test_a_failure_leaves_nothing_behind(
    tmp_path: Path,
    pip: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Pip(monkeypatch, **pip)
    assert wheelhouse.main(["--out", str(tmp_path / "wheels")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())
