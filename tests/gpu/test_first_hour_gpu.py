"""The first hour on real GPUs: what a CPU never shows (docs/cluster.md). What is recorded goes into the suite's result.

    python -m tools.bench.gpu_suite --out runs/first-hour --part first_hour

On one GPU there is nothing to gather or to reduce: the numbers are recorded, and two tests are skipped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.testing import do_bench

from ddk_ds.engine.ds_config import LEAD_LAYERS
from ddk_ds.engine.eight_bits import CAPABILITIES, FORMATS
from ddk_ds.engine.quantized import QuantizedLinear
from ddk_ds.train.preflight.machine import core_limit, cores
from tests.dist.ranks import run_ranks
from tests.dist.test_leaving import ends, outputs
from tests.gpu.test_kernel_gpu import GRAD_BOUND, LOSS_BOUND, assert_gpu_agrees
from tests.unit.kernels.test_vocabularies import VOCABULARIES, poisoned

Record = Callable[[str, Any], None]
LAYERS, HIDDEN, LENGTH = 16, 1024, 2048


@pytest.fixture(scope="module")
def gpus() -> int:
    return min(8, torch.cuda.device_count())


@pytest.fixture(scope="module")
def found(gpus: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    sizes = {"layers": LAYERS, "hidden": HIDDEN, "length": LENGTH}
    folder = str(tmp_path_factory.mktemp("first-hour"))
    result: dict[str, Any] = run_ranks("tests.dist.first_hour_worker:measure", gpus, folder=folder, **sizes)
    return result


def test_cores_of_a_rank(gpus: int, record_property: Record) -> None:
    row = cores([os.sched_getaffinity(0)] * gpus, "cuda", core_limit())
    record_property("cores", row.found)
    assert row.status == "pass", f"{row.found}: {row.fix}"


def test_a_rank_that_raises_ends_all(gpus: int, tmp_path: Path, record_property: Record) -> None:
    """The others wait in a kernel of NCCL."""
    does = ["raises", *["waits"] * (gpus - 1)]
    started = time.monotonic()
    codes = ends(does, tmp_path, "nccl")
    record_property("seconds of ranks of which one raises, with their start", round(time.monotonic() - started, 1))
    texts = outputs(tmp_path)
    assert set(codes) == {1}, texts
    assert "ValueError: planted" in texts[0], texts
    assert all("rank 0 on " in text and "ended the run with exit code 1" in text for text in texts[1:]), texts


def test_memory_of_a_teachers_pass(found: dict[str, Any], record_property: Record) -> None:
    """Released weights that the GPU has not passed yet are active and not allocated: the host's lead."""
    memory = found["teacher_pass"]
    for name, value in memory.items():
        record_property(f"teacher's pass: {name}", value)
    assert memory["retries"] == 0
    lead = memory["active"] - memory["allocated"]
    # Layers whose computation may be queued while a further one is gathered, and that one.
    assert lead <= (LEAD_LAYERS + 1) * found["layer_bytes"]


def test_collectives_and_waits_of_a_step(gpus: int, found: dict[str, Any], record_property: Record) -> None:
    record_property("a step's collectives", found["step"]["collectives"])
    record_property("a step's calls that wait for the GPU", found["step"]["waits"])
    if gpus > 1:  # alone, ZeRO-3 waits at each module for its stream of gathers, on which there is nothing
        assert len(found["step"]["waits"]) <= 1


def test_error_of_the_reduction(gpus: int, found: dict[str, Any], record_property: Record) -> None:
    if gpus < 2:
        pytest.skip("it takes two GPUs")
    record_property("error of a sum of gradients", found["reduction"])
    assert found["reduction"]["float32"] < 1e-6


@pytest.mark.parametrize(("vocab_size", "rows"), VOCABULARIES)
def test_the_head_at_a_real_vocabulary(vocab_size: int, rows: int) -> None:
    """Its time is in the part `loss_benchmark`."""
    case = poisoned(vocab_size, rows, dtype=torch.bfloat16)
    assert_gpu_agrees(case, LOSS_BOUND, GRAD_BOUND[torch.bfloat16])


def test_a_layer_in_fp8(record_property: Record) -> None:
    """The CPU's results, but for sums in another order; times of the two products and of the rounding beside them."""
    if torch.cuda.get_device_capability() < CAPABILITIES["fp8"]:
        pytest.skip("this GPU has no FP8")
    torch.manual_seed(0)
    weight, bias = torch.randn(1024, 512).bfloat16(), torch.randn(1024).bfloat16()
    layer, x = QuantizedLinear(weight, bias, FORMATS["fp8"]), torch.randn(3, 100, 512).bfloat16()
    x[0, 0], x[0, 1, 7], x[0, 2, 3] = 0, 3e4, float("nan")
    expected = layer(x)
    found = layer.cuda()(x.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7, equal_nan=True)
    width, tokens = 5120, 8192
    linear = torch.nn.Linear(width, width, bias=False, device="cuda", dtype=torch.bfloat16)
    small = QuantizedLinear(linear.weight.data, None, FORMATS["fp8"])
    x = torch.randn(tokens, width, device="cuda").bfloat16()
    with torch.inference_mode():
        for name, run in {"bf16": linear, "fp8": small, "fp8, compiled": torch.compile(small)}.items():
            milliseconds = do_bench(lambda run=run: run(x))
            record_property(f"ms of a linear layer, {tokens} x {width} x {width}, {name}", round(milliseconds, 3))
