"""`pytest --result=FILE`: what ran, how it ended, how long it took and the figures that tests noted, as a table.

A test notes a figure with pytest's `record_property(name, number)`; the table sums it over the cases of a test.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


@dataclass
class Line:
    """One test function: all its cases."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    figures: Counter[str] = field(default_factory=Counter)


class ResultFile:
    """Collects reports, and writes the file when the session ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[str, Line] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one case."""
        line = self._lines.setdefault(report.nodeid.partition("[")[0], Line())
        line.seconds += report.duration
        if report.when == "call" or not report.passed:
            line.outcomes[report.outcome] += 1
        if report.when == "call":
            line.figures.update({name: int(value) for name, value in report.user_properties})

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the table; nothing where nothing ran."""
        if self._lines:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """The file's content."""
        total = sum((line.outcomes for line in self._lines.values()), Counter[str]())
        rows = [
            f"| {name} | {_counts(line.outcomes)} | {line.seconds:.0f} | {_counts(line.figures)} |"
            for name, line in self._lines.items()
        ]
        return "\n".join(
            [
                "# The long tests",
                "",
                f"Written by `make test-full`: {_counts(total)}, {sum(x.seconds for x in self._lines.values()):.0f} s.",
                f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, "
                f"torch {torch.__version__}, numpy {np.__version__}.",
                "`make test` runs a few cases of each.",
                "",
                "| test | cases | seconds | figures, summed over the cases |",
                "| --- | --- | --- | --- |",
                *rows,
                "",
            ]
        )


def _counts(values: Counter[Any]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in values.items())
