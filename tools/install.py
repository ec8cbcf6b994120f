"""Install the project with everything that its tests need into .venv. `make setup` starts it after check_setup.py.

    python3 tools/install.py

pip makes a start with uv, the installer that constraints.txt names: uv brings the rest in a quarter of pip's time and
links the files to its cache. uv does not read pip's configuration, so what it says of indexes and certificates is
handed on by uv's environment variables. Prints what is wrong and exits with 1 if that fails; the next call then
installs every package anew, because the last one can be incomplete.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Options of pip, and the variables of uv that mean the same. The first is set unless the user has set one of them.
# The character separates several values.
VARIABLES = {
    "index-url": (" ", "UV_DEFAULT_INDEX", "UV_INDEX_URL"),
    "extra-index-url": (" ", "UV_INDEX", "UV_EXTRA_INDEX_URL"),
    "find-links": (",", "UV_FIND_LINKS"),
    "no-index": (" ", "UV_NO_INDEX"),
    "trusted-host": (" ", "UV_INSECURE_HOST"),
    "cert": (" ", "SSL_CERT_FILE"),
    "client-cert": (" ", "SSL_CLIENT_CERT"),
    "proxy": (" ", "ALL_PROXY"),
    "timeout": (" ", "UV_HTTP_TIMEOUT"),
}
# The sections of `pip config list`, the strongest last.
SECTIONS = ("global", "install", ":env:")


def pip_options(listing: Iterable[str]) -> dict[str, str]:
    """Return pip's options from the lines of `pip config list`, such as `global.index-url='...'`, by name."""
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in listing:
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in found:
            found[section][name.removeprefix("default-")] = ast.literal_eval(value)
    return {name: value for section in SECTIONS for name, value in found[section].items()}


def uv_environment(options: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to `environment` such that uv looks where pip with these options looks."""
    added = {}
    for name, (separator, *variables) in VARIABLES.items():
        if options.get(name) and not any(variable in environment for variable in variables):
            added[variables[0]] = separator.join(options[name].split())
    if "UV_INDEX" in added:  # pip takes the best version of all indexes, uv the first index that has the package
        added["UV_INDEX_STRATEGY"] = environment.get("UV_INDEX_STRATEGY", "unsafe-best-match")
    return added


def make_venv(venv: Path) -> None:
    """Make the environment, or add what it lacks. Raises SystemExit if it belongs to another Python."""
    python = venv / "bin/python"
    if os.path.lexists(python):
        ask = [str(python), "-c", "import sys; print(sys.version_info[:2])"]
        found = subprocess.run(ask, capture_output=True, text=True, check=False).stdout if python.exists() else ""
        if found.strip() != str(sys.version_info[:2]):
            version = ".".join(map(str, sys.version_info[:2]))
            raise SystemExit(f"set-up: {venv} is not of Python {version}: delete it, or name its Python by PYTHON=...")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)


def install(venv: Path, constraints: Path, requirements: Iterable[str]) -> None:
    """Install `requirements` and what they need into `venv`. Raises CalledProcessError if pip or uv fails."""
    unfinished = venv / ".unfinished"
    make_venv(venv)
    pip = [str(venv / "bin/python"), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "-c", str(constraints), "uv"], check=True)
    listing = subprocess.run([*pip, "config", "list"], check=True, capture_output=True, text=True).stdout
    options = pip_options(listing.splitlines())
    command = [str(venv / "bin/uv"), "pip", "install", "--python", str(venv / "bin/python")]
    # A killed installer leaves a package with some of its files, which looks installed.
    command += ["--reinstall"] if unfinished.exists() else []
    for path in (str(constraints), *options.get("constraint", "").split()):
        command += ["-c", path]
    unfinished.touch()
    subprocess.run([*command, *requirements], check=True, env={**os.environ, **uv_environment(options, os.environ)})
    unfinished.unlink()


def main() -> int:
    """Install. Returns the exit code: 0, or 1 if anything failed."""
    os.chdir(ROOT)
    try:
        install(ROOT / ".venv", ROOT / "constraints.txt", ["-e", ".[test]"])
    except subprocess.CalledProcessError as error:
        print(f"set-up: {Path(error.cmd[0]).name} failed with exit code {error.returncode}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
