"""FLOPs by formula beside torch's own count, and those of a run by hand."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from ddk_ds.config import Config, make_config
from ddk_ds.engine.flops import model_flops, run_flops, training_flops
from ddk_ds.engine.model_files import configured_files

CONFIGS = Path(__file__).parents[3] / "configs/models"
WIDTH: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {**WIDTH, "intermediate_size": 320, "vocab_size": 500, "max_position_embeddings": 512}
GPT2 = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 512, "vocab_size": 500}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**GATED, "num_key_value_heads": 4},
    "llama-grouped": {**GATED, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2": {**GATED, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen3-wide-heads": {**GATED, "num_key_value_heads": 2, "head_dim": 64},
    "mistral": {**GATED, "num_key_value_heads": 2, "sliding_window": None},
    "gemma": {**GATED, "num_key_value_heads": 1, "head_dim": 32},
    "gpt_neox": {**GATED, "intermediate_size": 512},
    "gpt2": GPT2,
    "gpt_bigcode": {**GPT2, "multi_query": True, "n_inner": 512},
    "opt": {**WIDTH, "ffn_dim": 512, "vocab_size": 500, "max_position_embeddings": 512, "word_embed_proj_dim": 128},
}


def counted(values: dict[str, Any], length: int, *, backward: bool = False, fake: bool = True) -> float:
    """FLOPs of a token by torch; fake tensors are meta tensors that claim to be on a CPU, and compute nothing.

    Attention is the plain one: of its fused kernel for CPUs torch's counter knows nothing.
    """
    with FakeTensorMode() if fake else nullcontext():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), attn_implementation="eager")
        ids = torch.zeros(1, length, dtype=torch.int64)
        model.train(backward)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            logits = model(input_ids=ids, use_cache=False).logits
            if backward:
                logits.sum().backward()
    return counter.get_total_flops() / length


def files_of(values: dict[str, Any], folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(values))
    return configured_files(folder / "config.json")


@pytest.mark.parametrize("length", [64, 512])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_flops_are_torchs(name: str, length: int, tmp_path: Path) -> None:
    values = {"model_type": name.partition("-")[0], **ARCHITECTURES[name]}
    ours = model_flops(files_of(values, tmp_path), length, causal=False)
    # OPT looks at its attention mask's values, which fake tensors have not.
    assert ours == pytest.approx(counted(values, length, fake=name != "opt"), rel=0.02)


@pytest.mark.parametrize("name", ["Qwen1.5-1.8B", "Qwen1.5-14B", "starcoderbase-3b"])
def test_forward_flops_of_the_papers_models(name: str) -> None:
    config = CONFIGS / f"{name}.json"
    ours = model_flops(configured_files(config), 2048, causal=False)
    assert ours == pytest.approx(counted(json.loads(config.read_text()), 2048), rel=0.02)


@pytest.mark.parametrize("name", ["llama-grouped", "gpt2"])
def test_training_is_three_forwards(name: str, tmp_path: Path) -> None:
    values = {"model_type": name.partition("-")[0], **ARCHITECTURES[name]}
    ours = model_flops(files_of(values, tmp_path), 256, causal=False)
    assert 3 * ours == pytest.approx(counted(values, 256, backward=True), rel=0.02)


def test_positions_are_looked_up(tmp_path: Path) -> None:
    """Learned positions are no matmul: with 100 times as many the FLOPs are the same."""
    few, many = ({"model_type": "gpt2", **GPT2, "n_positions": n} for n in (512, 51200))
    assert model_flops(files_of(few, tmp_path), 64) == model_flops(files_of(many, tmp_path), 64)


def config_of(**values: Any) -> Config:
    base = {"name": "run", "student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"path": "d"}}
    return make_config({**base, "stop": {"steps": 4000}, **values}, "test")


def test_a_runs_flops_by_hand() -> None:
    train = {"global_batch_samples": 4}
    data = {"path": "d", "sequence_length": 8, "validation_samples": 5}
    config = config_of(train=train, data=data, optimizer={"warmup_steps": 1})
    found = run_flops(config, 10.0, 100.0, steps=7, measurements=3, domains=2)
    tokens, measured = 7 * 4 * 8, 2 * 5 * 8
    assert found.cpt == 30 * tokens
    assert found.kd == 130 * tokens
    assert found.controller == (3 * 10 + 100) * measured
    assert found.ddk == found.own == 130 * tokens + (3 * 10 + 100) * measured
    assert found.kd_over_cpt == pytest.approx(13 / 3)
    alone = run_flops(
        config_of(method="cpt", teacher=None, train=train, data=data), 10.0, None, steps=7, measurements=3, domains=2
    )
    assert (alone.kd, alone.ddk, alone.ddk_over_kd) == (None, None, None)
    assert alone.own == 30 * tokens + 3 * 10 * measured


def test_a_teacher_that_does_not_run() -> None:
    assert training_flops(config_of(loss={"gamma": 0.0}), 10.0, 100.0) == 30.0
    assert training_flops(config_of(loss={"gamma": 0.0, "gamma_end": 0.5}), 10.0, 100.0) == 130.0
    assert training_flops(config_of(method="ted_filters"), 10.0, 100.0) == 110.0
