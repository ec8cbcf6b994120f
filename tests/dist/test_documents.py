"""Documents of a sample that do not see each other: losses and gradients are those of each document alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from ddk_ds.commands import adopt_command
from ddk_ds.config import load_config
from ddk_ds.data.loader import MixtureDataset
from ddk_ds.data.prepare import Plan, prepare
from ddk_ds.data.recipe import load_recipe
from ddk_ds.errors import DataError
from ddk_ds.train.inputs import check_files
from ddk_ds.train.run_dir import run_identity
from tests.dist.documents_worker import KINDS, without_borders
from tests.dist.ranks import run_ranks
from tests.dist.resume_worker import run_dir
from tests.dist.tiny import MIXTURES
from tests.unit.data.corpus import make_texts, write_recipe
from tests.unit.data.token_shards import write_mds
from tools.bench.small_run import without_clock, write_config

_MAJOR = int(transformers.__version__.partition(".")[0])
_RECURRENT = {"qwen3_next": MIXTURES["qwen3_next"]}
if _MAJOR >= 5:  # in transformers 4 it takes no positions, which is seen before it is loaded
    _RECURRENT["mamba"] = {"num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}


@pytest.mark.parametrize(
    ("world", "kinds"),
    [
        (2, ["llama", "gemma3_text", "gpt_oss"]),
        pytest.param(2, ["qwen3", "gpt2", "mixtral"], marks=pytest.mark.long("the same code for three more, 12 s")),
        pytest.param(1, list(KINDS), marks=pytest.mark.long("the same on one rank, 30 s")),
    ],
    ids=["most different", "others", "one rank"],
)
def test_packed_documents_give_the_losses_and_gradients_of_each_alone(
    tmp_path: Path, world: int, kinds: list[str]
) -> None:
    errors = run_ranks("tests.dist.documents_worker:compare", world, timeout_s=600, folder=str(tmp_path), kinds=kinds)
    assert errors.keys() == set(kinds)
    for kind, of_kind in errors.items():
        # Of the largest gradient. The right values are float64's; float32, each document alone, is off by 3e-7 to 1e-6.
        assert of_kind["loss"] < 1e-6 and of_kind["gradient"] < 2e-6 and of_kind["perplexity"] < 1e-6, (kind, errors)


def test_models_that_do_not_keep_documents_apart_are_refused(tmp_path: Path) -> None:
    said = run_ranks("tests.dist.documents_worker:refused", 1, folder=str(tmp_path), kinds=_RECURRENT)
    for kind in (*_RECURRENT, "unmasked", "moved"):
        assert "does not keep documents apart" in said[kind], said
    assert "(qwen3_next) does not keep" in said["qwen3_next"] and "set data.documents to joined" in said["qwen3_next"]
    assert "its place behind the document before it" in said["moved"]


def config_of(workspace: Path, folder: Path, documents: str, teacher: dict[str, Any] | None = None, **data: str) -> str:
    length = {"mixture": {"interval_steps": 2}, "stop": {"steps": 4}, "checkpoint": {"every_steps": 2}}
    return str(write_config(workspace, folder, data={"documents": documents, **data}, teacher=teacher or {}, **length))


def adopted_from(shards: Path, workspace: Path, folder: Path) -> Path:
    """Write prepared samples as llm-foundry's shards, of another size, and adopt them."""
    arguments = ["--tokenizer", str(workspace / "tokenizer"), "--out", str(folder / "taken"), "--borders", "eos"]
    for name in ("a", "b"):
        for split in ("train", "validation"):
            samples = MixtureDataset(shards, [name], split)
            write_mds(
                folder / "foundry" / name / split, (samples[number]["input_ids"] for number in range(len(samples)))
            )
        arguments.append(str(folder / "foundry" / name))
    assert adopt_command.main(arguments) == 0
    return folder / "taken"


def with_answers(folder: Path, workspace: Path) -> Path:
    """Prepare the texts of domain a beside a domain of conversations, whose answers are targets."""
    pairs = zip(*(make_texts(seed, 300, num_words=12) for seed in (1, 2)), strict=True)
    lines = [json.dumps({"prompt": asked, "completion": answered}) for asked, answered in pairs]
    (folder / "chat.jsonl").write_text("\n".join(lines))
    turn = "{% for m in messages %}{{ m.role }}: {{ m.content }}.\n{% endfor %}"
    (folder / "t.jinja").write_text(turn + "{% if add_generation_prompt %}assistant:{% endif %}")
    chat = {"sources": ["chat.jsonl"], "chat": {"form": "prompt_completion", "template": "t.jinja"}}
    recipe = write_recipe(folder / "chat.yaml", {"a": {"sources": ["a.jsonl"]}, "chat": chat})
    prepare(load_recipe(recipe), workspace / "tokenizer", folder / "answers", Plan(64, validation_samples=12))
    return folder / "answers"


def teachers_perplexity(shards: Path, name: str, workspace: Path) -> float:
    """Compute the teacher's perplexity of a domain's held-out targets by plain transformers, in float64."""
    held_out = MixtureDataset(shards, [name], "validation", masked=True)
    model = AutoModelForCausalLM.from_pretrained(workspace / "teacher", dtype=torch.float64)
    losses: list[float] = []
    for number in range(12):
        packed, _ = held_out.read(number)
        assert packed.lengths is not None and (packed.targets is None) == (name != "chat")
        ids, lengths = torch.from_numpy(packed.tokens.astype(np.int64)), packed.lengths.tolist()
        labels = ids if packed.targets is None else ids.masked_fill(~torch.from_numpy(packed.targets), -100)
        for document, of_document in zip(ids.split(lengths), labels.split(lengths), strict=True):
            with torch.no_grad():
                logits, valid = model(document[None]).logits[0, :-1], of_document[1:] >= 0
            of_tokens = torch.nn.functional.cross_entropy(logits[valid], document[1:][valid], reduction="none")
            losses += of_tokens.tolist()
    return math.exp(np.mean(losses))


def test_a_run_on_masked_documents(workspace: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        texts = make_texts(ord(name), 300, num_words=12)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = write_recipe(tmp_path / "r.yaml", {name: {"sources": [f"{name}.jsonl"]} for name in ("a", "b")})
    shards = tmp_path / "shards"
    manifest = prepare(load_recipe(recipe), workspace / "tokenizer", shards, Plan(64, validation_samples=12))
    data = {"path": str(shards)}
    masked = config_of(workspace, tmp_path / "masked", "auto", **data)
    likeliest = {"path": str(tmp_path / "cache"), "keep": "topk", "top_k": manifest.vocab_size}
    teacher = {"path": str(workspace / "teacher"), "cache": likeliest}
    cached = config_of(workspace, tmp_path / "cached", "masked", teacher, **data)
    adopted = config_of(workspace, tmp_path / "adopted", "auto", path=str(adopted_from(shards, workspace, tmp_path)))
    answers = with_answers(tmp_path, workspace)
    chat = config_of(workspace, tmp_path / "chat", "auto", path=str(answers))
    of_chat = {**teacher, "cache": {**likeliest, "path": str(tmp_path / "cache_of_chat")}}
    cached_chat = config_of(workspace, tmp_path / "cached_chat", "auto", of_chat, path=str(answers))
    starts = [(masked, "whole", None), (masked, "broken", 4), (cached, "cached", None), (adopted, "adopted", None)]
    starts += [(chat, "chat", None), (cached_chat, "cut", 4)]
    assert run_ranks("tests.dist.resume_worker:run_all", 2, timeout_s=500, starts=starts) == ["broken", "cut"]
    whole, cache = (without_clock(run_dir(path, name)) for path, name in ((masked, "whole"), (cached, "cached")))
    assert without_clock(run_dir(masked, "broken")) == whole
    assert without_clock(run_dir(adopted, "adopted")) == whole, "token shards of the same ids, read where they are"
    steps, of_cache = ([line for line in lines if line["kind"] == "step"] for lines in (whole, cache))
    kl = [[line["kl"] for line in lines] for lines in (steps, of_cache)]
    assert np.abs(np.subtract(*kl)).max() < 1e-4, "all tokens, rounded to bfloat16"
    # A sample has a label less than tokens for each of its documents: together, as many as the ledger says.
    first, names = whole[0], list(manifest.domains)
    tokens = [sum(line["domain_tokens"]) for line in steps]
    assert len(set(tokens)) > 1 and max(tokens) < 8 * 63
    assert abs(first["teacher_ppl"][names[0]] / teachers_perplexity(shards, names[0], workspace) - 1) < 1e-5
    # Text and conversations together: the cache's run, which broke off, is as the other.
    live, cut = (without_clock(run_dir(path, name)) for path, name in ((chat, "chat"), (cached_chat, "cut")))
    steps, of_cache = ([line for line in lines if line["kind"] == "step"] for lines in (live, cut))
    assert [line["domain_tokens"] for line in steps] == [line["domain_tokens"] for line in of_cache]
    assert np.abs(np.subtract(*([line["kl"] for line in lines] for lines in (steps, of_cache)))).max() < 1e-4
    for name, found in live[0]["teacher_ppl"].items():
        assert abs(found / teachers_perplexity(answers, name, workspace) - 1) < 1e-5, name


def test_shards_without_borders_are_joined(workspace: Path, tmp_path: Path) -> None:
    old = without_borders(workspace / "shards", tmp_path / "old")
    models = workspace / "student", workspace / "teacher"

    def inputs(shards: Path, documents: str) -> Any:
        config = load_config(Path(config_of(workspace, tmp_path / "c", documents)), [f"data.path={shards}"])
        found = check_files(config, *models, 1)
        return found.masked, run_identity(config, found.fingerprints)["content.documents"]

    assert inputs(workspace / "shards", "auto") == inputs(workspace / "shards", "masked") == (True, "masked")
    # As in the directory of a run of before, which has no such key: it goes on.
    assert inputs(workspace / "shards", "joined") == inputs(old, "auto") == inputs(old, "joined") == (False, None)
    with pytest.raises(DataError, match=r"data.documents is masked, and the shards of .*old have no borders of doc"):
        inputs(old, "masked")
    shutil.copy(workspace / "shards/domains.json", old / "domains.json")
    with pytest.raises(DataError, match=r"is not what .* describes"):
        inputs(old, "auto")
