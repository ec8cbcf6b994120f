"""The mark `long`: `@pytest.mark.long("reason")` keeps a test out of `make test`, and says why.

What `make test` keeps finds most faults a second: units, one real launch, one kill and resume, parity on two ranks.
"""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # before the tests are deselected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Raise pytest.UsageError if a test is marked `long` without a reason."""
    wrong = [
        item.nodeid
        for item in items
        for mark in item.iter_markers("long")
        if mark.kwargs or len(mark.args) != 1 or not isinstance(mark.args[0], str) or len(mark.args[0].split()) < 2
    ]
    if wrong:
        raise pytest.UsageError(f'write the reason: @pytest.mark.long("two new interpreters"): {", ".join(wrong)}')
