"""Functions that every rank of test_documents.py runs: documents kept apart, against each document run alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from transformers import AutoModelForCausalLM

from ddk_ds.data.loader import MixtureDataset, interval_loader, validation_batches
from ddk_ds.data.manifest import DomainInfo, Manifest, SplitInfo, load_manifest, write_manifest
from ddk_ds.data.mds import write_split
from ddk_ds.engine.attention_masks import backbone_pass
from ddk_ds.engine.model_files import read_model
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.split_check import check_documents
from ddk_ds.engine.student import load_student
from ddk_ds.engine.teacher import load_teacher
from ddk_ds.errors import ConfigError
from ddk_ds.kernels import Options
from ddk_ds.methods import make_method
from ddk_ds.train.step import train_step
from ddk_ds.train.validation import perplexities
from tests.dist.tiny import VOCAB, save_model, tiny_config

LENGTH, GAMMA, TEMPERATURE = 24, 0.7, 1.5
# Documents of eight samples: one of one token, some at both ends, one that fills its sample.
LENGTHS = [[9, 1, 14], [24], [5, 5, 5, 5, 4], [23, 1], [1, 23], [11, 13], [1, 1, 1, 1, 20], [17, 7]]
WITH_TARGETS = ("qwen3", "gpt2")
"""Kinds that are compared on samples of which some tokens are targets, and in one micro-batch none."""
_ROTARY = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {**_ROTARY, "head_dim": 8},
    "gemma3_text": {},  # a window of 5
    "gpt2": {"n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_oss": {
        **{**_ROTARY, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": {},
}


def write_data(root: Path, *, targets: bool) -> None:
    """Write prepared data of one domain, whose samples have the documents of LENGTHS."""
    generator = np.random.default_rng(3)
    lengths = [np.array(of_sample) for of_sample in LENGTHS]
    splits = []
    for split in ("train", "validation"):
        samples = list(generator.integers(0, VOCAB, (len(LENGTHS), LENGTH)))
        masks = list(generator.random((len(LENGTHS), LENGTH)) < 0.4) if targets else None
        if masks is not None:
            masks[2][:] = masks[3][:] = False
        shape: dict[str, Any] = {"sequence_length": LENGTH, "dtype": "uint16", "lengths": lengths}
        made = write_split(root / "text" / split, samples, targets=masks, **shape)
        splits.append(SplitInfo(documents=1, tokens=len(LENGTHS) * LENGTH, bytes=1, **made))
    domains = {"text": DomainInfo(*splits, chat={} if targets else None)}
    write_manifest(Manifest(root, LENGTH, "uint16", "", VOCAB, 0, domains, borders=True))


def without_borders(root: Path, out: Path) -> Path:
    """Write the samples of prepared data as an earlier version did, and return `out`."""
    manifest, domains = load_manifest(root), {}
    for name, domain in manifest.domains.items():
        splits = []
        for split in ("train", "validation"):
            data = MixtureDataset(root, [name], split)
            samples = [data.read(number)[0].tokens for number in range(len(data))]
            shape = {"sequence_length": manifest.sequence_length, "dtype": manifest.dtype}
            splits.append(replace(getattr(domain, split), **write_split(out / name / split, samples, **shape)))  # type: ignore[arg-type]
        domains[name] = DomainInfo(*splits)
    write_manifest(replace(manifest, root=out, domains=domains, borders=False))
    return out


def compare(runtime: Runtime, folder: str, kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return by architecture the largest errors of a step's loss and gradients, and of perplexities, relative.

    The right values are those of plain transformers in float64, each document a pass of its own.
    """
    found = {}
    for kind in kinds:
        root, shape = Path(folder) / kind, KINDS[kind]
        if runtime.comm.rank == 0:
            write_data(root / "data", targets=kind in WITH_TARGETS)
            shape = {**shape, "initializer_range": 0.1}
            save_model(root / "student", model_type=kind, vocab=VOCAB + 3, tied=True, seed=1, **shape)
            save_model(root / "teacher", model_type=kind, hidden=64, vocab=VOCAB, tied=False, seed=2, **shape)
        runtime.comm.barrier()
        found[kind] = _errors(runtime, root)
    return found


def _errors(runtime: Runtime, root: Path) -> dict[str, float]:
    comm = runtime.comm
    config = tiny_config(
        root,
        student={"gradient_checkpointing": True, "router_aux_loss": 0.0},
        teacher={"micro_batches_per_pass": 2},
        train={"global_batch_samples": 8, "micro_batch_samples": 2},
        loss={"gamma": GAMMA, "temperature": TEMPERATURE, "chunk_tokens": 16},
    )
    student = load_student(config, read_model(root / "student", "student.path"), VOCAB, comm)
    teacher = load_teacher(config, read_model(root / "teacher", "teacher.path"), VOCAB, comm)
    options = Options(VOCAB, gamma=0.0, chunk_tokens=16)
    data = {"rank": comm.rank, "world": comm.world_size, "micro_batch": 2}
    dataset = MixtureDataset(root / "data", ["text"], masked=True)
    held_out = validation_batches(root / "data", ["text"], num_samples=7, masked=True, **data)
    for key, model in (("student", student), ("teacher", teacher)):
        check_documents(model, held_out[0][0].input_ids, VOCAB, key, comm)  # type: ignore[arg-type]
    gradients: dict[str, torch.Tensor] = {}

    def note() -> None:
        for name, parameter in student.whole.named_parameters():
            gradient = safe_get_full_grad(parameter)
            assert gradient is not None, name
            gradients[name] = gradient.double()

    student._check_gradients = note  # type: ignore[method-assign]
    metrics = train_step(
        student,
        make_method(config, teacher, options, 1, {}),
        list(interval_loader(dataset, np.arange(8), **data)),
        learning_rate=0.0,
        progress=0.0,
        teacher_pass_size=2,
        num_domains=1,
        device=runtime.device,
        comm=comm,
    )
    ppl = [
        float(perplexities(model, held_out, options=options, device=runtime.device, comm=comm)[0])
        for model in (student, teacher)
    ]
    assert metrics.domain_tokens == [sum(int((labels >= 0).sum()) for _, labels in _alone(root, "train"))]
    if comm.rank != 0:
        return {}
    loss, right, right_ppl = _plain(root)
    largest = max(float(gradient.abs().max()) for gradient in right.values())
    errors = [float((gradients[name] - gradient).abs().max()) for name, gradient in right.items()]
    return {
        "loss": abs(metrics.loss / loss - 1),
        "gradient": max(errors) / largest,
        "perplexity": max(abs(a / b - 1) for a, b in zip(ppl, right_ppl, strict=True)),
    }


def _alone(root: Path, split: str, count: int = len(LENGTHS)) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the ids (1, l) of each document and its labels (l - 1,), -100 where a token is no target."""
    samples = MixtureDataset(root / "data", ["text"], split)
    for number, lengths in enumerate(LENGTHS[:count]):
        packed, _ = samples.read(number)
        ids = torch.from_numpy(packed.tokens.astype(np.int64))
        labels = ids if packed.targets is None else ids.masked_fill(~torch.from_numpy(packed.targets), -100)
        yield from (
            (of_ids[None], of[1:]) for of_ids, of in zip(ids.split(lengths), labels.split(lengths), strict=True)
        )


def _plain(root: Path) -> tuple[float, dict[str, torch.Tensor], list[float]]:
    """Return the loss and gradients of the step, and the perplexities of student and teacher."""
    models = [
        AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float64, attn_implementation="eager")
        for name in ("student", "teacher")
    ]
    for model in models:
        if hasattr(model, "set_experts_implementation"):  # torch's products of all experts at once have no float64
            model.set_experts_implementation("eager")

    def logits(model: Any, document: torch.Tensor) -> torch.Tensor:
        return model(document, use_cache=False).logits[0, :-1, :VOCAB]  # type: ignore[no-any-return]

    total, count = torch.zeros((), dtype=torch.float64), 0
    for document, labels in _alone(root, "train"):
        if document.shape[1] == 1:
            continue
        ours = logits(models[0], document)
        with torch.no_grad():
            theirs = (logits(models[1], document) / TEMPERATURE).log_softmax(-1)
        of_tokens = F.kl_div((ours / TEMPERATURE).log_softmax(-1), theirs, log_target=True, reduction="none").sum(1)
        kl = of_tokens[labels >= 0].sum()
        total = total + F.cross_entropy(ours, labels, reduction="sum") + GAMMA * TEMPERATURE**2 * kl
        count += int((labels >= 0).sum())
    loss = total / count
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in models[0].named_parameters()
    }
    held_out = list(_alone(root, "validation", 7))
    ppl = []
    for model in models:
        with torch.no_grad():
            losses = [
                F.cross_entropy(logits(model, one)[labels >= 0], labels[labels >= 0], reduction="none")
                for one, labels in held_out
                if one.shape[1] > 1
            ]
        ppl.append(math.exp(float(torch.cat(losses).mean())))
    return float(loss.detach()), gradients, ppl


@contextmanager
def _joined(_backbone: Any, ids: torch.Tensor, *_: Any) -> Iterator[dict[str, torch.Tensor]]:
    yield {"input_ids": ids}


@contextmanager
def _unmoved(*arguments: Any) -> Iterator[dict[str, torch.Tensor]]:
    with backbone_pass(*arguments) as given:
        yield {"input_ids": given["input_ids"]}


def refused(runtime: Runtime, folder: str, kinds: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return what is said of teachers that do not keep documents apart, by architecture.

    "unmasked" is a Llama whose masks are not cut, "moved" a GPT-2 whose positions do not begin anew.
    """
    said = {}
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    for name, shape in {**kinds, "unmasked": {}, "moved": KINDS["gpt2"]}.items():
        root, kind = Path(folder) / name, {"unmasked": "llama", "moved": "gpt2"}.get(name, name)
        save_model(root / "teacher", model_type=kind, vocab=VOCAB, tied=False, seed=2, **shape)
        teacher = load_teacher(tiny_config(root), read_model(root / "teacher", "teacher.path"), VOCAB, runtime.comm)
        with pytest.MonkeyPatch.context() as patch:
            if name == "unmasked":
                patch.setattr("ddk_ds.engine.teacher.backbone_pass", _joined)
            if name == "moved":
                patch.setattr("ddk_ds.engine.teacher.backbone_pass", _unmoved)
            try:
                check_documents(teacher, ids, VOCAB, "teacher", runtime.comm)
                said[name] = ""
            except ConfigError as error:
                said[name] = str(error)
    return said
