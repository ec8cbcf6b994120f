"""Whether compiled layers may become the default: parity over 50 steps, no late compilation, no more reserved memory.

    python -m tools.bench.gpu_suite --out runs/compiled --part compiled_layers

Node: layer by layer inside the hooks of ZeRO-3. GPU: the teacher as a whole, a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.compiled_worker import faults, train
from tests.dist.ranks import run_ranks

ROUNDING = {"fp32": 1e-4, "bf16": 1e-2}
"""Share by which losses may differ: rounding of sums in another order, grown over 50 steps of AdamW."""


@pytest.mark.parametrize("within", ["node", "gpu"])
@pytest.mark.parametrize("precision", ROUNDING)
def test_compiled_layers(
    within: str, precision: str, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    sizes = {"precision": precision, "within": within, "layers": 8, "hidden": 1024, "length": 1024}
    gpus = min(8, torch.cuda.device_count())
    plain, compiled = (
        run_ranks(
            f"{train.__module__}:train", gpus, folder=str(tmp_path / str(on)), timeout_s=300.0, compiled=on, **sizes
        )
        for on in (False, True)
    )
    for name, result in (("plain", plain), ("compiled", compiled)):
        record_property(f"{precision}, {within}, {name}: GB reserved", round(result["reserved"] / 1e9, 3))
    apart = max(abs(a - b) / abs(a) for a, b in zip(plain["losses"], compiled["losses"], strict=True))
    record_property(f"{precision}, {within}: largest difference of a loss", f"{apart:.1e}")
    assert faults(plain, compiled, ROUNDING[precision]) == []
