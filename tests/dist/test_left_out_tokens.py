"""A teacher with added tokens beyond the student's vocabulary: its probabilities are over the tokens of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ddk_ds.commands.generate_command import main as generate
from ddk_ds.data.loader import validation_batches
from tests.dist.ranks import run_ranks
from tests.unit.data.test_shared_vocabulary import SIZE, THINK, with_tokens, write_shards
from tools.bench.small_run import without_clock, write_config

DOMAINS = ["python", "cpp", "mathematics"]


def perplexities(model: Path, shards: Path) -> list[float]:
    """Return each domain's perplexity by transformers' own logits, without those from SIZE on."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for batches in validation_batches(shards, DOMAINS, num_samples=12, rank=0, world=1, micro_batch=12):
        ids = batches[0][0]
        with torch.no_grad():
            logits = loaded(ids).logits[:, :-1, :SIZE].double()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        found.append(loss.exp().item())
    return found


def test_probabilities_are_over_the_tokens_of_both(workspace: Path, tmp_path: Path) -> None:
    wide = with_tokens(workspace / "teacher", tmp_path / "wide", THINK)
    # Rows that change: the teacher itself has no such tokens.
    weights = load_file(wide / "model.safetensors")
    weights["lm_head.weight"][SIZE:] *= 40
    save_file(weights, wide / "model.safetensors", {"format": "pt"})
    short = {"stop": {"steps": 3}, "optimizer": {"warmup_steps": 0}}
    configs = {
        name: str(write_config(workspace, tmp_path, name=name, teacher={"path": str(path)}, **short))
        for name, path in {"wide": wide, "narrow": workspace / "teacher"}.items()
    }
    starts = [(path, name, None) for name, path in configs.items()]
    run_ranks("tests.dist.resume_worker:run_all", 2, starts=starts)
    ledgers = {name: without_clock(tmp_path / "runs" / name) for name in configs}
    interval = next(line for line in ledgers["wide"] if line["kind"] == "interval")
    expected = dict(zip(DOMAINS, perplexities(wide, workspace / "shards"), strict=True))
    assert interval["teacher_ppl"] == pytest.approx(expected, rel=1e-5)
    # A teacher from whose files the rows are cut trains the same student.
    assert len(ledgers["wide"]) >= 4 and ledgers["wide"] == ledgers["narrow"]
    assert json.loads((tmp_path / "runs/wide/run.json").read_text())["content.left_out"] == THINK
    events = [json.loads(line) for line in (tmp_path / "runs/wide/events.jsonl").read_text().splitlines()]
    assert events[0]["left_out"] == {"<think>": SIZE, "</think>": SIZE + 1}
    assert generate([str(tmp_path / "runs/wide"), "--prompt", "def f", "--max-new-tokens", "2"]) == 0


def test_a_sample_with_a_token_left_out_ends_the_run(workspace: Path, tmp_path: Path) -> None:
    wide = with_tokens(workspace / "teacher", tmp_path / "wide", THINK)
    shards = write_shards(wide, tmp_path, "<think> x = 1 </think>")
    manifest = json.loads((shards / "domains.json").read_text())
    for split in ("train", "validation"):  # as data of earlier versions
        del manifest["domains"]["chat"][split]["largest_id"]
    (shards / "domains.json").write_text(json.dumps(manifest))
    config = write_config(workspace, tmp_path, teacher={"path": str(wide)}, data={"path": str(shards)})
    with pytest.raises(AssertionError, match=r"of domain 'chat': sample 0 holds id 601, the vocabulary has 600"):
        run_ranks("tests.dist.resume_worker:run_all", 1, starts=[(str(config), "run", None)])
