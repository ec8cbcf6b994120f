"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.result_file import ResultFile
from tests.workspace import make_workspace

# Triton decides when its kernels are defined whether to interpret them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--result", type=Path, help="file that gets a table of what ran")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.result is not None:
        config.pluginmanager.register(ResultFile(config.option.result))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared world on real text; tests must not change it."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))
