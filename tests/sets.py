"""Which tests `make test` runs, and how pytest's workers share them.

`@pytest.mark.long("reason")` keeps a test out of `make test`, and says why. What stays finds most faults a second:
units, one real launch, one kill and resume, parity on two ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

# Their tests start several processes: one worker runs all of a room, one after another. Half of their time they wait,
# for a time limit, a store or Slurm.
TOGETHER = {"dist": "ranks", "e2e": "launchers", "nodes": "daemons", "slurm": "daemons"}


@pytest.hookimpl(tryfirst=True)  # before the tests are deselected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Raise pytest.UsageError if a test is marked `long` without a reason."""
    wrong = [item.nodeid for item in items for mark in item.iter_markers("long") if not _has_reason(mark)]
    if wrong:
        raise pytest.UsageError(f'write the reason: @pytest.mark.long("two new interpreters"): {", ".join(wrong)}')


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's: not on every machine that runs tests/gpu
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return a scheduler that gives each group of tests to one worker, the largest group first."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        """Tests of one `group_of` stay together."""

        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Return an argument's name for its bytes, so that all workers collect the same tests: gzip's hold the time."""
    return argname if isinstance(val, bytes) else None


def group_of(nodeid: str) -> str:
    """Return the group of a test: the tests of a file share their fixtures, those of some rooms a worker."""
    file = Path(nodeid.partition("::")[0])
    return TOGETHER.get(file.parts[1], str(file)) if file.parts[1:2] else str(file)


def _has_reason(mark: pytest.Mark) -> bool:
    """Return True if the mark's only argument is a text of two words or more."""
    return len(mark.args) == 1 and not mark.kwargs and isinstance(mark.args[0], str) and len(mark.args[0].split()) > 1
