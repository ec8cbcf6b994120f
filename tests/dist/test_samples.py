"""Continuations of prompts while a run trains: plain transformers' own, on schedule, and no number changes by them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from ddk_ds.commands.export_command import main as export
from ddk_ds.data.loader import validation_batches
from ddk_ds.run_files import read_ledger_end
from tests.dist.ranks import run_ranks
from tools.bench.small_run import without_clock, write_config

pytestmark = pytest.mark.long("three runs, 25 s of CPU, for one option that is off by default")

DOMAINS = ["python", "cpp", "mathematics"]
TEXTS = ["def main(argument):\n    return", "The", "namespace c10 {\nstruct"]
TOKENS = 12


@pytest.fixture(scope="module")
def runs(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of runs on two ranks: without samples, with, broken off and resumed, own prompts."""
    folder = tmp_path_factory.mktemp("samples")
    student = folder / "student"  # with dropout, which would show a model that is left in another mode
    shutil.copytree(workspace / "student", student)
    values = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(values | {"attention_dropout": 0.1}))
    monitor = {"samples_every": 3, "sample_tokens": TOKENS}
    sections: dict[str, Any] = {
        "student": {"path": str(student)},
        "stop": {"steps": 7},
        "checkpoint": {"every_steps": 3, "keep_last": 9, "in_background": False},
    }
    without = str(write_config(workspace, folder, name="without", **sections))
    sampled = str(write_config(workspace, folder, name="with", **sections, monitor=monitor))
    short: dict[str, Any] = {**sections, "stop": {"steps": 1}, "optimizer": {"warmup_steps": 0}}
    own = {**monitor, "sample_prompts": TEXTS, "tensorboard": True}
    given = str(write_config(workspace, folder, name="given", **short, monitor=own))
    # The ledger of "with" is an interval, samples 0, steps 1 to 3, samples 3, ...: it breaks off after step 3 is saved.
    starts = [(without, "without", None), (sampled, "with", None), (sampled, "broken", 6), (given, "given", None)]
    broken = run_ranks("tests.dist.resume_worker:run_all", 2, starts=starts)
    assert broken == ["broken"]
    return folder / "runs"


def samples(run: Path) -> dict[int, list[dict[str, str]]]:
    """Return the samples of a ledger by step; each step has them once."""
    lines = [line for line in without_clock(run) if line["kind"] == "samples"]
    found = {line["step"]: line["samples"] for line in lines}
    assert len(found) == len(lines)
    return found


def plain(model: Path, prompts: list[list[int]]) -> list[str]:
    """Return the greedy continuations by transformers alone, one prompt after the other, with its cache."""
    import torch

    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        new = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        texts.append(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def column(rows: list[dict[str, str]], name: str) -> list[str]:
    return [row[name] for row in rows]


def test_no_number_changes(runs: Path) -> None:
    numbers = [line for line in without_clock(runs / "with") if line["kind"] != "samples"]
    assert numbers == without_clock(runs / "without")


def test_on_schedule_once_each(runs: Path) -> None:
    assert list(samples(runs / "with")) == [0, 3, 6, 7]
    kinds = [line["kind"] for line in without_clock(runs / "with")]
    assert kinds[:6] == ["interval", "samples", "step", "step", "step", "samples"] and kinds[-2:] == ["end", "samples"]


def test_a_resumed_run_samples_as_if_nothing_had_happened(runs: Path) -> None:
    discarded = (runs / "broken" / "ledger.discarded.jsonl").read_text()
    assert discarded.startswith('{"kind": "samples", "step": 3')
    assert without_clock(runs / "broken") == without_clock(runs / "with")


def test_plain_transformers_says_the_same(workspace: Path, runs: Path) -> None:
    first = validation_batches(workspace / "shards", DOMAINS, num_samples=1, rank=0, world=1, micro_batch=1)
    prompts = [batches[0][0][0, :32].tolist() for batches in first]
    found = samples(runs / "with")
    models = {0: runs.parent / "student", 7: runs / "with/export"}
    for step in (3, 6):
        models[step] = runs / f"with-{step}"
        assert export([str(runs / "with"), "--step", str(step), "--out", str(models[step])]) == 0
    tokenizer = AutoTokenizer.from_pretrained(workspace / "tokenizer")
    by_teacher = plain(workspace / "teacher", prompts)
    for step, rows in found.items():
        assert column(rows, "name") == DOMAINS
        assert column(rows, "prompt") == [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]
        assert column(rows, "student") == plain(models[step], prompts), step
        assert column(rows, "teacher") == by_teacher
    assert column(found[0], "student") != column(found[7], "student"), "the student learns"


def test_own_prompts_of_different_lengths(workspace: Path, runs: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(workspace / "tokenizer")
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    assert len({len(ids) for ids in prompts}) == 3
    rows = samples(runs / "given")[1]
    assert column(rows, "name") == ["1", "2", "3"] and column(rows, "prompt") == TEXTS
    assert column(rows, "student") == plain(runs / "given/export", prompts)
    assert column(rows, "teacher") == plain(workspace / "teacher", prompts)


def test_tensorboard_shows_the_texts(runs: Path) -> None:
    events = EventAccumulator(str(runs / "given/monitor/tensorboard")).Reload()
    assert {f"samples/{name}/text_summary" for name in "123"} <= set(events.Tags()["tensors"])
    last = events.Tensors("samples/2/text_summary")[-1]
    row = samples(runs / "given")[1][1]
    assert last.step == 1 and row["student"] in last.tensor_proto.string_val[0].decode()


def test_the_ledgers_end_leaves_samples_out(runs: Path) -> None:
    last = read_ledger_end(runs / "with", steps=2, measurements=1)
    assert [line["kind"] for line in last] == ["step", "step", "end"]
