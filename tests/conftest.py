"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests import sets
from tests.result_file import ResultFile
from tools.bench.small_run import make_workspace

if TYPE_CHECKING:
    from tests.s3_server import S3Server

# Triton decides when its kernels are defined whether to interpret them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--result", type=Path, help="file that gets a table of what ran")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(sets)
    if config.option.result is not None:
        config.pluginmanager.register(ResultFile(config.option.result))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared world on real text; tests must not change it."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))


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
