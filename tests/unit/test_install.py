"""Set-up installs with uv from where pip is configured to look, and a killed set-up is not believed complete."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tools import install

WHEEL = "ddk_probe-1.0-py3-none-any.whl"


class Quiet(SimpleHTTPRequestHandler):
    """A file server without a log."""

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing."""


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """Address of a package index with one package, ddk-probe."""
    folder = tmp_path / "served/simple/ddk-probe"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        info = "ddk_probe-1.0.dist-info"
        wheel.writestr("ddk_probe.py", "HERE = True\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: ddk-probe\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"ddk_probe.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    (folder / "index.html").write_text(f'<a href="{WHEEL}">{WHEEL}</a>')
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/simple"
    server.shutdown()
    server.server_close()


@pytest.mark.long("an environment and four installations, 20 s; make setup installs by the same code")
def test_a_package_comes_from_pips_index_and_a_killed_installation_is_done_again(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uv itself is copied: the index of this test has no package but the probe."""
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {index}\n")
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    venv, constraints = tmp_path / "venv", tmp_path / "constraints.txt"
    constraints.touch()
    install.make_venv(venv)
    shutil.copy(shutil.which("uv", path=str(Path(sys.executable).parent)) or "", venv / "bin/uv")
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "uv-99.dist-info").mkdir()  # so that pip takes it as installed
    (site / "uv-99.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: uv\nVersion: 99\n")

    install.install(venv, constraints, ["ddk-probe"])
    assert (site / "ddk_probe.py").is_file()

    constraints.write_text("ddk-probe==2.0\n")
    with pytest.raises(subprocess.CalledProcessError):
        install.install(venv, constraints, ["ddk-probe"])
    constraints.write_text("")
    (site / "ddk_probe.py").unlink()  # as a killed installer leaves a package
    install.install(venv, constraints, ["ddk-probe"])
    assert (site / "ddk_probe.py").is_file()

    # Without the failure before it, the missing file would not have been seen.
    (site / "ddk_probe.py").unlink()
    install.install(venv, constraints, ["ddk-probe"])
    assert not (site / "ddk_probe.py").exists()


def test_the_strongest_of_pips_options_counts_and_uvs_own_variables_more() -> None:
    listing = [
        ":env:.find-links='/wheels /more'",
        ":env:.default-timeout='180'",
        "global.cert='/ca.crt'",
        "global.extra-index-url='\\nfile:///one\\nfile:///two'",
        "global.find-links='/other'",
        "global.index-url='https://user:secret@global/simple'",
        "install.index-url='https://install/simple'",
        "search.index='https://unused'",
    ]
    options = install.pip_options(listing)
    assert install.uv_environment(options, {}) == {
        "UV_DEFAULT_INDEX": "https://install/simple",
        "UV_INDEX": "file:///one file:///two",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/wheels,/more",
        "SSL_CERT_FILE": "/ca.crt",
        "UV_HTTP_TIMEOUT": "180",
    }
    own = {"UV_INDEX_URL": "https://own", "UV_EXTRA_INDEX_URL": "https://extra", "SSL_CERT_FILE": "/own.crt"}
    assert install.uv_environment(options, own).keys() == {"UV_FIND_LINKS", "UV_HTTP_TIMEOUT"}


def test_an_environment_of_another_python_is_not_mixed_with_ours(tmp_path: Path) -> None:
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho '(3, 9)'\n")
    python.chmod(0o755)
    with pytest.raises(SystemExit, match=r"is not of Python 3\.\d+: delete it, or name its Python by PYTHON="):
        install.make_venv(tmp_path)
    python.unlink()
    python.symlink_to("/no/such/python")  # the interpreter was removed
    with pytest.raises(SystemExit, match="delete it"):
        install.make_venv(tmp_path)
