"""A teacher that lies complete on each rank is a plain module, and computes what the sharded one does, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dist.ranks import run_ranks

EXPERTS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16}
EXPERTS |= {"num_experts": 4, "num_experts_per_tok": 2}
INT8 = {"quantize": "int8"}


def case(kind: str, precision: str, *, tied: bool = False, **section: Any) -> dict[str, Any]:
    return {"kind": kind, "tied": tied, "precision": precision, "section": section, "shape": EXPERTS}


CASES = [
    case("llama", "fp32"),
    case("llama", "bf16", tied=True),
    case("llama", "bf16", tied=True, **INT8),
    case("llama", "bf16", quantize="fp8"),
    case("llama", "bf16", quantize="int8_dynamic"),
    case("gpt_neox", "bf16"),
    case("olmoe", "fp32"),
    case("olmoe", "bf16", **INT8),
]


@pytest.mark.parametrize("world", [2, pytest.param(1, marks=pytest.mark.long("one rank has all of the two's parts"))])
def test_numbers_are_those_of_the_sharded_teacher_and_of_plain_transformers(tmp_path: Path, world: int) -> None:
    found = run_ranks("tests.dist.resident_worker:beside_sharded", world, folder=str(tmp_path), cases=CASES)
    for of_case, result in zip(CASES, found, strict=True):
        assert result["equal"], of_case
        rounding, dtype = {"fp32": (1e-6, "torch.float32"), "bf16": (0.02, "torch.bfloat16")}[of_case["precision"]]
        off = {"int8": 0.2, "int8_dynamic": 0.2, "fp8": 0.4}.get(of_case["section"].get("quantize"), rounding)
        assert result["off"] <= off, (of_case, result)
        assert set(result["dtypes"]) == {dtype}


@pytest.mark.parametrize("teacher", [{"micro_batches_per_pass": 2}, {"shard_within": "gpu"}], ids=str)
def test_nothing_is_copied_between_the_teacher_and_the_loss(tmp_path: Path, teacher: dict[str, Any]) -> None:
    sections = {"teacher": teacher}
    found = run_ranks("tests.dist.resident_worker:way_to_the_loss", 2, folder=str(tmp_path), sections=sections)
    assert found["read"] == teacher.get("micro_batches_per_pass", 1)
    assert found["dtypes"] == ["torch.bfloat16"] and found["same numbers"]
    assert found["no copy"]
