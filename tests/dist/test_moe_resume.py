"""Runs with mixtures of experts, killed and resumed, have the ledger of the run that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.dist.ranks import run_ranks
from tests.dist.resume_worker import run_dir
from tools.bench.small_run import run_here, without_clock, write_config

EXPERTS = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS |= {"hidden_size": 32, "head_dim": 8, "intermediate_size": 64, "moe_intermediate_size": 16}
EXPERTS |= {"num_experts": 64, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "norm_topk_prob": True}
EXPERTS |= {"router_aux_loss_coef": 0.01, "tie_word_embeddings": False}


def written(workspace: Path, folder: Path) -> str:
    """Write a random mixture of 64 experts, 8 for each token; return its directory."""
    (folder / "experts.json").write_text(json.dumps(EXPERTS))
    made = ["--config", str(folder / "experts.json"), "--out", str(folder / "experts")]
    run_here("init", *made, "--tokenizer", str(workspace / "tokenizer"))
    return str(folder / "experts")


@pytest.mark.long("five starts of two ranks, 30 s; resuming itself is in test_resume.py")
def test_a_mixture_teaches_over_three_kills(workspace: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "mixture": {"interval_steps": 2},
        "stop": {"steps": 8},
        "checkpoint": {"every_steps": 2, "in_background": False},  # complete before the step after it
    }
    sections |= {"train": {"micro_batch_samples": 1}, "teacher": {"path": written(workspace, tmp_path)}}
    config = str(write_config(workspace, tmp_path, **sections))
    run_ranks("tests.dist.resume_worker:go_on", 2, config_path=config, name="whole")
    for lines in (5, 8, 11):
        with pytest.raises(AssertionError, match="a rank failed; exit codes"):
            run_ranks("tests.dist.moe_worker:train_until_killed", 2, config_path=config, name="killed", lines=lines)
    run_ranks("tests.dist.resume_worker:go_on", 2, config_path=config, name="killed")
    whole, killed = (without_clock(run_dir(config, name)) for name in ("whole", "killed"))
    assert len(whole) == 4 + 8 + 1
    assert killed == whole
    events = (run_dir(config, "killed") / "events.jsonl").read_text()
    assert events.count('"resume"') == 3, "a kill came before the first checkpoint, or not at all"


@pytest.mark.long("two runs of two ranks, 20 s; the routers' loss itself is in test_moe.py")
def test_the_routers_loss_is_that_of_an_uninterrupted_run(workspace: Path, tmp_path: Path) -> None:
    experts = written(workspace, tmp_path)
    sections = {"mixture": {"interval_steps": 2}, "stop": {"steps": 4}, "checkpoint": {"every_steps": 2}}
    config = str(write_config(workspace, tmp_path, student={"path": experts}, **sections))
    names = {"whole": None, "broken": 5}
    run_ranks("tests.dist.resume_worker:break_and_resume", 2, config_path=config, names=names)
    whole, broken = (without_clock(run_dir(config, name)) for name in names)
    # With the joined experts of transformers 5 two starts of one run differ in the tenth digit of a gradient's norm.
    assert broken == [_close(line) for line in whole]
    steps = [line for line in whole if line["kind"] == "step"]
    assert len(steps) == 4
    for step in steps:  # 8 of 64 experts for each token: at best 8
        assert step["router_aux_loss"] > 8.0
        assert step["loss"] == pytest.approx(step["ce"] + 0.2 * step["kl"] + 0.01 * step["router_aux_loss"], rel=1e-6)


def _close(value: Any) -> Any:
    """Return a line of the ledger that equals one whose numbers are the same to rounding."""
    if isinstance(value, dict):
        return {key: _close(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_close(one) for one in value]
    return pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
