"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import setuptools  # noqa: F401  # for torch.compile: after an `import pip` by any test it can't be imported any more
import torch

from tests import sets
from tests.result_file import ResultFile
from tools.bench.small_run import make_workspace

if TYPE_CHECKING:
    from tests.s3_server import S3Server

# Triton decides when its kernels are defined whether to interpret them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# Each worker has one core: with more threads, those that wait for one another stand still.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


# A shell without job control starts a background command with SIGINT ignored, and so would be all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--result", type=Path, help="file that gets a table of what ran")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(sets)
    if config.option.result is not None:
        config.pluginmanager.register(ResultFile(config.option.result))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared world on real text, one for all workers; tests must not change it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a directory in the session's
        folder = folder.parent
    with (folder / "workspace.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / "workspace"
        return made if (made / "student/model.safetensors").exists() else make_workspace(made)


@pytest.fixture
def offline_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse every request to the hub, as HF_HUB_OFFLINE=1 does, in this test alone: huggingface_hub keeps sessions."""
    from huggingface_hub import utils

    # Versions 0 and 2 close their connections by different names.
    close = getattr(utils, "close_session", None) or utils.reset_sessions
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        close()
        yield
    close()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An S3 API on the loopback, which this process and those that it starts find."""
    # Only here: moto is not on every machine that runs tests/gpu.
    from tests.s3_server import ENVIRONMENT, S3Server

    server = S3Server()
    for key, value in (ENVIRONMENT | {"S3_ENDPOINT_URL": server.endpoint}).items():
        monkeypatch.setenv(key, value)
    with server.running():
        yield server
