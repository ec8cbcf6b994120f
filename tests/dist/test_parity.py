"""The two engines, the chunked loss and the reductions equal plain training on full logits, in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.dist.ranks import run_ranks

CASES = [
    # world, micro-batches a rank, tied heads, checkpointing, evaluation between steps, method, ranks of a sample
    (2, 4, True, True, True, "ddk", 1),
    *(
        pytest.param(*case, marks=pytest.mark.long("20 s of CPU; the case above has all of its parts but one"))
        for case in (
            (4, 2, True, True, True, "ddk", 2),
            (2, 1, False, False, True, "ddk", 1),
            (1, 2, True, False, False, "ddk", 1),
            (2, 4, False, True, False, "ddk", 1),
            (2, 2, True, False, True, "cpt", 1),
            (4, 1, False, False, True, "ddk", 4),
        )
    ),
]


@pytest.mark.parametrize(("world", "micro_batches", "tied", "checkpointing", "evaluate", "method", "sharing"), CASES)
def test_training_equals_plain_training(
    tmp_path: Path,
    world: int,
    micro_batches: int,
    tied: bool,
    checkpointing: bool,
    evaluate: bool,
    method: str,
    sharing: int,
) -> None:
    result = run_ranks(
        "tests.dist.parity_worker:compare",
        world,
        folder=str(tmp_path),
        tied=tied,
        micro_batches=micro_batches,
        checkpointing=checkpointing,
        evaluate=evaluate,
        method=method,
        sections={"train": {"sequence_parallel": sharing}},
    )
    # loss, CE, KL and gradient norm of 5 AdamW steps, then every weight
    np.testing.assert_allclose(result["ours"], result["plain"]["steps"], rtol=1e-6, atol=1e-8)
    assert result["weight_error"] < 1e-6
    assert result["tokens"] == [[8 * 23]] * 5
    if evaluate:
        np.testing.assert_allclose(result["ppl"], result["plain"]["ppl"], rtol=1e-5)
        assert result["gathered"] == []
    assert set(result["traces"]) == {"COMPLETE"}, "a parameter trace is invalid: nothing would be prefetched"
