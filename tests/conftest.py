"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.workspace import make_workspace

# Triton decides when its kernels are defined whether to interpret them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared world on real text; tests must not change it."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))
