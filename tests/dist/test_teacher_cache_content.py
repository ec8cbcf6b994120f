"""What `ddk teach` keeps of a teacher, and says of it, beside plain transformers on the same samples in float32."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ddk_ds.data.mds import open_split
from ddk_ds.data.store import LocalStore
from ddk_ds.data.teacher_samples import Drawn, Likeliest
from tests.dist.ranks import run_ranks
from tests.dist.teacher_cache_worker import all_samples
from tests.dist.test_teacher_cache_runs import WORKER, config

DOMAINS, SAMPLES, TEMPERATURE, TOP = ("python", "cpp", "mathematics"), 5, 1.5, 24


def plain_logits(
    model: Path, workspace: Path, places: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """Return the logits (L, V) of the tokenizer's tokens, and the ids (L,), of samples of the workspace's shards."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    splits = {name: open_split(LocalStore(workspace / "shards"), f"{name}/train") for name in DOMAINS}
    found = {}
    for name, number in places:
        ids = torch.from_numpy(splits[name].tokens(number).astype(np.int64))
        with torch.no_grad():
            found[name, number] = plain(ids[None]).logits[0], ids
    return found


def test_what_is_kept_and_said(workspace: Path, tmp_path: Path) -> None:
    caches = {name: tmp_path / name for name in ("sampled", "topk")}
    keys = {"sampled": {"draws": 256}, "topk": {"keep": "topk", "top_k": TOP}}
    configs = [config(workspace, tmp_path, name, {"path": str(caches[name]), **keys[name]}) for name in caches]
    said = dict(zip(caches, run_ranks(WORKER + "fill", 2, configs=configs, samples=SAMPLES), strict=True))
    kept = {name: all_samples(path) for name, path in caches.items()}
    logits = plain_logits(workspace / "teacher", workspace, kept["sampled"])
    assert kept["sampled"].keys() == kept["topk"].keys() and len(logits) == SAMPLES * len(DOMAINS)
    losses: dict[str, list[float]] = {name: [] for name in DOMAINS}
    for place, (of_sample, ids) in logits.items():
        log_q = of_sample.log_softmax(-1)[:-1].gather(1, ids[1:, None]).squeeze(1)
        losses[place[0]].append(-log_q.mean().item())
        drawn, likeliest = kept["sampled"][place], kept["topk"][place]
        assert isinstance(drawn, Drawn) and isinstance(likeliest, Likeliest)
        for one in (drawn, likeliest):
            assert np.abs(one.label_log_probs[:-1] - log_q.numpy()).max() < 1e-5 and one.label_log_probs[-1] == 0
        at_temperature = (of_sample / TEMPERATURE).log_softmax(-1).double()
        entropy = -(at_temperature.exp() * at_temperature).sum(-1)
        assert np.abs(drawn.entropy - entropy.numpy()).max() < 1e-5
        top = at_temperature.topk(TOP)
        assert np.abs(likeliest.log_probs / top.values.numpy() - 1).max() < 2**-8 + 1e-5, "bfloat16"
        assert (at_temperature.gather(1, torch.from_numpy(likeliest.ids)) - top.values).abs().max() < 1e-5
        rest = (1 - top.values.exp().sum(-1)).log().numpy()
        assert np.abs(likeliest.log_tail - rest).max() < 1e-4
    expected = {name: np.exp(np.mean(values)) for name, values in losses.items()}
    for sentence in said.values():
        told = re.search(r"perplexity of these samples, at temperature 1: (.*)\n", sentence)
        assert told is not None and dict(item.split(" ") for item in told[1].split(", ")) == {
            name: f"{value:.4g}" for name, value in expected.items()
        }
        worse = max(expected.values()) > of_sample.shape[1]
        assert sentence.count("alarm: the teacher is worse than guessing") == 2 * worse, "at the begin and at the end"
