"""What several of these tests compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_run import forked
from tools.bench.small_run import write_config

WHOLE: dict[str, Any] = {"stop": {"steps": 12}, "checkpoint": {"every_steps": 100}}


@pytest.fixture(scope="session")
def whole(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run by the options WHOLE that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    forked(write_config(workspace, folder, name="whole", **WHOLE))
    return folder / "runs/whole"
