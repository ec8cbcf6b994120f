"""Ranks that share each sample: the numbers are those of ranks that each have samples of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dist.ranks import run_ranks
from tools.bench.small_run import without_clock, write_config

MASKED = {"documents": "masked"}
SHAPES: dict[str, dict[str, Any]] = {
    "gemma3_text": {},
    "gpt_bigcode": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}


@pytest.mark.parametrize("model_type", SHAPES)
def test_windows_and_learned_positions_are_those_of_the_whole_sample(tmp_path: Path, model_type: str) -> None:
    """Gemma 3 has layers with a window of 5 of the 24 tokens; GPT-BigCode one head of keys, and learned positions."""
    result = run_ranks(
        "tests.dist.parity_worker:compare",
        2,
        folder=str(tmp_path),
        tied=True,
        micro_batches=2,
        checkpointing=False,
        evaluate=False,
        method="ddk",
        shape={"model_type": model_type, **SHAPES[model_type]},
        sections={"train": {"sequence_parallel": 2}, "teacher": {"micro_batches_per_pass": 2}},
    )
    np.testing.assert_allclose(result["ours"], result["plain"]["steps"], rtol=1e-6, atol=1e-8)
    assert result["weight_error"] < 1e-6 and result["tokens"] == [[8 * 23]] * 5


def test_a_run_goes_on_with_other_ranks_of_a_sample(workspace: Path, tmp_path: Path) -> None:
    """All numbers are those of a run whose ranks have samples of their own, with documents apart."""
    alone, shared = (
        str(write_config(workspace, tmp_path, name=name, train={"sequence_parallel": sharing}, data=MASKED))
        for name, sharing in (("alone", 1), ("shared", 2))
    )
    run_ranks("tests.dist.resume_worker:go_on", 2, timeout_s=300, config_path=alone, name="alone")
    paths = [shared, alone]
    run_ranks("tests.dist.resume_worker:change_over", 2, timeout_s=300, config_paths=paths, name="shared", lines=7)
    ledgers = (without_clock(tmp_path / "runs" / name) for name in ("alone", "shared"))
    ones, others = ledgers
    assert len(ones) == len(others) > 8
    for one, other in zip(ones, others, strict=True):
        assert one["kind"] == other["kind"] and one["domain_tokens"] == other["domain_tokens"]
        assert (one.get("ids_sha"), one.get("counts")) == (other.get("ids_sha"), other.get("counts"))
        for key in ("loss", "ce", "kl", "grad_norm") if one["kind"] == "step" else ("student_ppl", "teacher_ppl"):
            assert one[key] == pytest.approx(other[key], rel=1e-5), key
