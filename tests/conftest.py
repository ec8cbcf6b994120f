"""Fixtures that several rooms' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workspace import make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared world on real text; tests must not change it."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))
