"""Mixtures of experts, as student and as teacher: experts that no rank chooses, or only some, and the routers' loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dist.ranks import run_ranks

# Every second sample repeats one token, whose copies choose one expert of a layer: many are chosen on some ranks only,
# or on none.
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIZES |= {"moe_intermediate_size": 16, "num_experts_per_tok": 1, "norm_topk_prob": False}
BALANCED = {**SIZES, "model_type": "qwen3_moe", "num_experts": 24, "router_aux_loss_coef": 0.05}
# A family without a loss for its routers, and not one of the three whose blocks DeepSpeed itself gathers together.
GLM = {**SIZES, "model_type": "glm4_moe", "n_routed_experts": 24, "first_k_dense_replace": 0, "n_group": 1}
GLM |= {"topk_group": 1, "n_shared_experts": 1, "intermediate_size": 32}
CASES = [
    # world, micro-batches a rank, micro-batches a pass of the teacher, whole layers, checkpointing
    (2, 2, 1, False, True),
    *(
        pytest.param(*case, marks=pytest.mark.long("20 s of CPU; the case above has experts that no rank chooses"))
        for case in ((4, 2, 2, True, "selective"), (1, 2, 1, False, False), (1, 2, 2, True, True))
    ),
]


@pytest.mark.parametrize(("world", "micro_batches", "a_pass", "whole_layers", "checkpointing"), CASES)
def test_training_equals_plain_training(
    tmp_path: Path, world: int, micro_batches: int, a_pass: int, whole_layers: bool, checkpointing: bool | str
) -> None:
    section: dict[str, Any] = {"whole_layers": whole_layers}
    result = run_ranks(
        "tests.dist.parity_worker:compare",
        world,
        folder=str(tmp_path),
        tied=False,
        micro_batches=micro_batches,
        checkpointing=checkpointing,
        evaluate=True,
        method="ddk",
        shape=BALANCED if whole_layers else GLM,
        sections={"student": section, "teacher": {**section, "micro_batches_per_pass": a_pass}},
    )
    # loss, CE, KL, gradient norm and the routers' loss of 5 AdamW steps, then every weight
    np.testing.assert_allclose(result["ours"], result["plain"]["steps"], rtol=1e-6, atol=1e-8)
    least = 1.0 if whole_layers else 0.0
    assert min(step[-1] for step in result["ours"]) >= least, "balanced choices of one expert have a loss of 1"
    assert result["weight_error"] < 1e-6
    np.testing.assert_allclose(result["ppl"], result["plain"]["ppl"], rtol=1e-5)


def test_a_teacher_in_8_bits(tmp_path: Path) -> None:
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16}
    kinds = {
        "gpt_oss": {**small, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},  # fused in each version
        "olmoe": {**small, "num_experts": 4, "num_experts_per_tok": 2},
    }
    llama = {"llama": {**small, "attention_bias": True}}
    for found in run_ranks("tests.dist.quantized_worker:int8_teachers", 2, folder=str(tmp_path), kinds=kinds).values():
        assert found["off"] < 1e-4, "a router is rounded, or an expert is not"
        assert 1e-3 < found["rounding"] < 0.2
        assert found["scales"] == found["rows"], "the estimate of memory has all of the other elements"
    kinds = {**kinds, **llama}
    options = {"kinds": kinds, "skipped": {"llama": [1]}, "formats": ["fp8", "int8_dynamic"]}
    for kind, found in run_ranks(
        "tests.dist.quantized_worker:rounded_inputs", 2, folder=str(tmp_path / "both"), **options
    ).items():
        assert found["same"], f"{kind}: sharded over two ranks it computes something else than in one process"
        fine = 1 if kind.startswith("fp8") else 4  # int8 rounds to 8 digits, beside which bf16's own errors show
        assert found["off"] < fine * found["rounding"] / 10 and 5e-3 / fine < found["rounding"] < 0.3, (kind, found)
        assert found["scales"] == found["rows"], kind


def test_routers_have_the_precision_that_the_model_asks_for(tmp_path: Path) -> None:
    # transformers 5 keeps GLM4-MoE's router in float32 in a bf16 model: rounded, it chooses other experts at times.
    assert run_ranks("tests.dist.moe_worker:off_in_bf16", 2, folder=str(tmp_path), shape=GLM) < 1e-4
