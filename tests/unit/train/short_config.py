"""The configuration of a run that is never started, for code that only reads one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddk_ds.config import Config, make_config


def config_of(folder: Path, **sections: Any) -> Config:
    """Return a configuration; `sections` are merged into it."""
    values: dict[str, Any] = {
        "name": "run",
        "output_dir": str(folder),
        "student": {"path": "student"},
        "teacher": {"path": "teacher"},
        "data": {"path": "data"},
        "stop": {"intervals": 2},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return make_config(values, "test")
