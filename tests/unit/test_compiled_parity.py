"""What the GPU suite's part of compiled layers takes for a fault, on results that are made up."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.compiled_worker import faults

PLAIN = {"losses": [5.0, 4.0, 3.0], "late": "", "reserved": 1000}
GOOD = {"losses": [5.0, 4.0001, 3.0002], "late": "", "reserved": 1010}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, ""),
        ({"reserved": 900}, ""),
        ({"losses": [5.0, 4.0001, 3.0004]}, "step 3 has a loss of 3.0004, and of 3.0 without"),
        ({"losses": [5.0, float("nan"), 3.0002]}, "step 2 has a loss of nan"),
        ({"losses": PLAIN["losses"]}, "nothing was compiled"),
        ({"late": "warning: 2 graphs were compiled after the first interval"}, "2 graphs"),
        ({"reserved": 1021}, "1,021 bytes are reserved, 1,000 without"),
    ],
)
def test_faults(change: dict[str, Any], fault: str) -> None:
    found = faults(PLAIN, {**GOOD, **change}, rounding=1e-4)
    assert len(found) == bool(fault) and all(fault in one for one in found), found
