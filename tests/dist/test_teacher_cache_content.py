"""What `ddk teach` keeps of a teacher, and says of it, beside plain transformers on the same samples in float32."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from ddk_ds.config import load_config
from ddk_ds.data.manifest import load_manifest
from ddk_ds.data.mds import open_split
from ddk_ds.data.store import LocalStore
from ddk_ds.data.teacher_samples import Drawn, Likeliest
from tests.dist.ranks import run_ranks
from tests.dist.resume_worker import run_dir
from tests.dist.teacher_cache_worker import all_samples
from tests.dist.test_teacher_cache_runs import WORKER, config
from tools.bench.small_run import without_clock, write_config

DOMAINS, SAMPLES, TEMPERATURE, TOP = ("python", "cpp", "mathematics"), 5, 1.5, 24


def plain_logits(
    model: Path, workspace: Path, places: Iterable[tuple[str, int]], split: str = "train"
) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """Return the logits (L, V) of the tokenizer's tokens, and the ids (L,), of samples of the workspace's shards."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    splits = {name: open_split(LocalStore(workspace / "shards"), f"{name}/{split}") for name in DOMAINS}
    found = {}
    for name, number in places:
        ids = torch.from_numpy(splits[name].tokens(number).astype(np.int64))
        with torch.no_grad():
            found[name, number] = plain(ids[None]).logits[0], ids
    return found


def sharper(model: Path, out: Path) -> Path:
    """Write a model whose logits are 20 times those of `model`."""
    copytree(model, out)
    weights = load_file(out / "model.safetensors")
    save_file({**weights, "lm_head.weight": 20 * weights["lm_head.weight"]}, out / "model.safetensors")
    return out


def with_another_token(model: Path, out: Path) -> Path:
    """Write a model whose tokenizer has another name for a token."""
    copytree(model, out)
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    token = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary["another"] = vocabulary.pop(token)
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if "".join(pair) != token]
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    return out


def test_each_domain_has_its_own_teacher(workspace: Path, tmp_path: Path) -> None:
    teachers = dict.fromkeys(DOMAINS, workspace / "teacher") | {"cpp": sharper(workspace / "teacher", tmp_path / "cpp")}
    manifest = load_manifest(workspace / "shards")
    cache = {"path": str(tmp_path / "cache"), "keep": "topk", "top_k": manifest.vocab_size, "mode": "read_only"}

    def write(name: str, **by_domain: Path) -> str:
        section = {"path": str(workspace / "teacher"), "cache": cache}
        others = {domain: str(path) for domain, path in by_domain.items()}
        loss = {"gamma": 2.0, "temperature": TEMPERATURE}
        teacher = {**section, "by_domain": others}
        return str(write_config(workspace, tmp_path, name=name, teacher=teacher, loss=loss, stop={"steps": 3}))

    reading = write("reading", cpp=teachers["cpp"])
    teachings = load_config(reading, []).teachings(list(manifest.domains))
    assert [part[1] for part in teachings] == ["data.domains=[python,mathematics]", "data.domains=[cpp]"]
    wrong = {
        "swapped": write("swapped", python=teachers["cpp"]),
        "unknown": write("unknown", cppp=teachers["cpp"]),
        "tokens": write("tokens", cpp=with_another_token(workspace / "teacher", tmp_path / "tokens")),
    }
    found = run_ranks(
        WORKER + "teachers_by_domain",
        2,
        timeout_s=300,
        fills=[" ".join([reading, *part]) for part in teachings],
        reading=reading,
        wrong=list(wrong.values()),
    )
    losses, divergences = [], []
    places = [(name, number) for name, number in found["places"]]
    assert len(places) == 8 and {"cpp", "python"} <= {name for name, _ in places}
    student = plain_logits(workspace / "student", workspace, places)
    by_teacher = {name: plain_logits(path, workspace, places) for name, path in teachers.items()}
    for place, (own, ids) in student.items():
        log_q = (by_teacher[place[0]][place][0][:-1] / TEMPERATURE).log_softmax(-1)
        log_p = (own[:-1] / TEMPERATURE).log_softmax(-1)
        divergences.append(kl_div(log_p, log_q, log_target=True, reduction="batchmean").item())
        losses.append(cross_entropy(own[:-1], ids[1:]).item())
    first = next(line for line in without_clock(run_dir(reading, "reading")) if line["kind"] == "step")
    assert first["ce"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert first["kl"] == pytest.approx(np.mean(divergences), abs=2e-4), "bfloat16"
    assert np.mean(divergences) > 0.1, "another teacher would be noticed"
    for name, value in zip(manifest.domains, found["teacher_ppl"], strict=True):
        held_out = plain_logits(teachers[name], workspace, [(name, i) for i in range(12)], split="validation")
        expected = np.exp(np.mean([cross_entropy(logits[:-1], ids[1:]).item() for logits, ids in held_out.values()]))
        assert value == pytest.approx(expected, rel=1e-5), name
    errors = dict(zip(wrong, found["errors"], strict=True))
    assert "the teacher of domain" in errors["swapped"] and "teacher.by_domain the teacher that" in errors["swapped"]
    assert "teacher.by_domain: 'cppp' is not a domain of this run: did you mean 'cpp'?" in errors["unknown"]
    assert "teacher.by_domain.cpp" in errors["tokens"] and "their vocabularies differ" in errors["tokens"]


def test_what_is_kept_and_said(workspace: Path, tmp_path: Path) -> None:
    caches = {name: tmp_path / name for name in ("sampled", "topk")}
    keys = {"sampled": {"draws": 256}, "topk": {"keep": "topk", "top_k": TOP}}
    configs = [config(workspace, tmp_path, name, {"path": str(caches[name]), **keys[name]}) for name in caches]
    said = dict(zip(caches, run_ranks(WORKER + "teach_each", 2, configs=configs, samples=SAMPLES), strict=True))
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
