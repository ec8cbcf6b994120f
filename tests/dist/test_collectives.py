"""The collectives of an optimizer step: their number is a function of the layers alone, and gradients go in float32."""

from __future__ import annotations

from pathlib import Path

from ddk_ds.engine.memory_estimate import COMMUNICATORS
from tests.dist.collectives_worker import MICRO_BATCHES
from tests.dist.ranks import run_ranks


def collectives(layers: int, reduced: str = "float32") -> dict[str, int]:
    """Return the calls of one step in bf16 by operator and dtype.

    For each micro-batch the student's layers, its embedding, which is the head too, its last norm, and the teacher's
    head are gathered, and the gradients of the first three reduced. The rest is the number of tokens, two for the
    gradient norm, and the step's sums.
    """
    return {
        "_allgather_base_ bfloat16": MICRO_BATCHES * (layers + 3),
        f"_reduce_scatter_base_ {reduced}": MICRO_BATCHES * (layers + 2),
        "allreduce_ float64": 4,
    }


def test_the_collectives_of_a_step(tmp_path: Path) -> None:
    """By default DeepSpeed keeps norms and other small tensors whole, and gathers each by itself after every update."""
    sizes = [(2, 16), (4, 16), (4, 24)]
    cases = [{"layers": layers, "hidden": hidden} for layers, hidden in sizes]
    rounded = {**cases[0], "train": {"reduce_dtype": "bfloat16"}}
    worker = "tests.dist.collectives_worker:steps"
    *results, in_bf16 = run_ranks(worker, 2, folder=str(tmp_path), cases=[*cases, rounded])
    for (layers, _), result in zip(sizes, results, strict=True):
        assert result["counted"] == collectives(layers)
        assert not result["whole"]
        assert not result["compiler"], "seconds of each start, for DeepSpeed's Muon (engine/student.py)"
        assert 2 <= len(result["groups"]) <= COMMUNICATORS  # NCCL would have a communicator for each
    assert in_bf16["counted"] == collectives(2, "bfloat16")
