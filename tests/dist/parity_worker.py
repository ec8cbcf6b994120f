"""Runs on every rank of test_parity.py: the engines against plain single-process training on full logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from ddk_ds.config import Config
from ddk_ds.data.loader import HeldOutBatch
from ddk_ds.engine.model_files import read_model
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.student import Student, load_student
from ddk_ds.engine.teacher import Teacher, load_teacher
from ddk_ds.kernels import Options
from ddk_ds.methods import make_method, next_token_labels
from ddk_ds.train.learning_rate import learning_rate
from ddk_ds.train.step import train_step
from ddk_ds.train.validation import perplexities
from tests.dist.tiny import VOCAB, save_model, tiny_config

STEPS, SAMPLES, LENGTH = 5, 8, 24
# One step of warm-up to 1e-3, then a cosine to 1e-4 at step 5, which is not reached.
RATES = [1e-3, 1e-3, *(5.5e-4 + 4.5e-4 * math.cos(math.pi * part / 4) for part in (1, 2, 3))]


def compare(
    runtime: Runtime,
    folder: str,
    tied: bool,
    micro_batches: int,
    checkpointing: bool | str,
    evaluate: bool,
    method: str,
    shape: dict[str, Any] | None = None,
    sections: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train 5 AdamW steps on the engines, and the same steps plainly; returns both and the engines' state.

    `shape` is that of both models, if they are not the usual ones; `sections` are added to the configuration.
    """
    comm, root = runtime.comm, Path(folder)
    if comm.rank == 0:
        save_model(root / "student", vocab=VOCAB + 6, tied=tied, seed=1, **(shape or {}))
        save_model(root / "teacher", hidden=48, vocab=VOCAB + 19, tied=tied, seed=2, **(shape or {}))
    comm.barrier()
    sharing = (sections or {}).get("train", {}).get("sequence_parallel", 1)
    rank, world = comm.rank // sharing, comm.world_size // sharing
    config = _config(root, micro_batches * world, checkpointing, method, sections or {})
    student = load_student(config, read_model(root / "student", "student.path"), VOCAB, comm)
    teacher = None
    if config.teacher is not None:
        teacher = load_teacher(config, read_model(root / "teacher", "teacher.path"), VOCAB, comm)
    head = Options(VOCAB, gamma=0.0, chunk_tokens=16)
    loop = make_method(config, teacher, head, 1, {})
    held_out = [[HeldOutBatch(batch[:2], torch.tensor([True, rank == 0]))] for batch in _batches(7, 2)]
    options = {"options": head, "device": runtime.device, "comm": comm}
    metrics, ppl = [], []
    for step, samples in enumerate(_batches(0, STEPS)):
        rate = learning_rate(step, STEPS, config.optimizer)
        rows = samples.reshape(micro_batches, world, -1, LENGTH)[:, rank]
        batch: Any = [
            {"input_ids": r, **dict.fromkeys(("domain", "sample_id"), torch.zeros(len(r), dtype=torch.int64))}
            for r in rows
        ]
        metrics.append(
            train_step(
                student,
                loop,
                batch,
                learning_rate=rate,
                progress=0.0,
                teacher_pass_size=config.teacher_pass_size,
                num_domains=1,
                device=runtime.device,
                comm=comm,
            )
        )
        if evaluate and step in (1, 4):
            ppl.append(perplexities(student, held_out, **options).tolist())
            if teacher is not None:
                ppl.append(perplexities(teacher, held_out, **options).tolist())
    return {
        "ours": [[m.loss, m.ce, m.kl, m.grad_norm, m.router_aux_loss or 0.0] for m in metrics],
        "plain": _plain(root, config, evaluate, micro_batches * world, world) if comm.rank == 0 else None,
        "ppl": ppl,
        "tokens": [m.domain_tokens for m in metrics],
        "weight_error": _weight_error(student, root, comm.rank),
        "traces": [_trace(model) for model in (student, teacher) if model is not None],
        "gathered": _gathered(student, teacher),
    }


def _config(root: Path, passes: int, checkpointing: bool | str, method: str, more: dict[str, Any]) -> Config:
    sections: dict[str, Any] = {
        "student": {"gradient_checkpointing": checkpointing, **more.get("student", {})},
        "teacher": more.get("teacher", {}),
        "train": {"global_batch_samples": SAMPLES, "micro_batch_samples": SAMPLES // passes, **more.get("train", {})},
        # AdamW divides by the root of the squared gradient: with the default eps a gradient of rounding noise would
        # become a step of the learning rate's size, in other directions on both sides.
        "optimizer": {"eps": 1e-5},
        "loss": {"gamma": 0.7, "temperature": 1.5, "chunk_tokens": 16},
    }
    if method == "cpt":
        sections |= {"method": "cpt", "teacher": None, "mixture": {"controller": "equal"}}
    return tiny_config(root, **sections)


def _batches(seed: int, count: int) -> list[torch.Tensor]:
    """Batches of random tokens; every second sample repeats one token, so that its tokens choose one expert."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randint(0, VOCAB, (SAMPLES, LENGTH), generator=generator) for _ in range(count)]
    for batch in batches:
        batch[::2] = batch[::2, :1]
    return batches


def _plain(root: Path, config: Config, evaluate: bool, parts: int, world: int) -> dict[str, Any]:
    """The same training as one would write it without DeepSpeed, chunks or shards."""
    student = AutoModelForCausalLM.from_pretrained(root / "student")
    teacher = AutoModelForCausalLM.from_pretrained(root / "teacher") if config.teacher is not None else None
    options = config.optimizer
    matrices = [p for p in student.parameters() if p.dim() > 1]
    vectors = [p for p in student.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=options.betas, eps=options.eps)
    steps, ppl = [], []
    for step, samples in enumerate(_batches(0, STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        labels = next_token_labels(samples).flatten()
        logits = student(samples).logits[..., :VOCAB].flatten(0, 1)
        ce = F.cross_entropy(logits, labels)
        kl = torch.zeros(())
        if teacher is not None:
            with torch.no_grad():
                target = teacher(samples).logits[..., :VOCAB].flatten(0, 1)
            t = config.loss.temperature
            rows = F.kl_div(
                (logits / t).log_softmax(-1), (target / t).log_softmax(-1), log_target=True, reduction="none"
            ).sum(-1)
            kl = rows[labels != -100].mean()
        loss = ce + (config.loss.gamma * config.loss.temperature**2 * kl if teacher is not None else 0.0)
        router = torch.zeros(())
        if (weight := getattr(student.config, "router_aux_loss_coef", 0.0)) > 0:
            router = torch.stack([student(part, output_router_logits=True).aux_loss for part in samples.chunk(parts)])
            router = router.mean()
            loss = loss + weight * router
        optimizer.zero_grad()
        loss.backward()
        for (
            parameter
        ) in student.parameters():  # an expert that no token chooses decays, as all experts in one tensor do
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), options.clip_norm)
        optimizer.step()
        steps.append([float(value.detach()) for value in (loss, ce, kl, norm, router)])
        if evaluate and step in (1, 4):
            ppl += [_plain_ppl(model, world) for model in (student, teacher) if model is not None]
    student.save_pretrained(root / "plain")
    return {"steps": steps, "ppl": ppl}


def _plain_ppl(model: Any, world: int) -> list[float]:
    """Each domain: rank 0's first two samples, and the first one of each other rank of `world`, the same sample."""
    values = []
    for batch in _batches(7, 2):
        with torch.no_grad():
            nll = F.cross_entropy(
                model(batch[:2]).logits[..., :VOCAB].transpose(1, 2), next_token_labels(batch[:2]), reduction="none"
            ).sum(1)
        values.append([float(v) for v in nll])
    return [math.exp((world * first + second) / ((world + 1) * (LENGTH - 1))) for first, second in values]


def _weight_error(student: Student, root: Path, rank: int) -> float:
    """Largest difference of a weight after training from plain training."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    plain = dict(AutoModelForCausalLM.from_pretrained(root / "plain").named_parameters()) if rank == 0 else {}
    worst = 0.0
    for name, parameter in student.whole.named_parameters():
        with GatheredParameters([parameter]):
            if rank == 0:
                worst = max(worst, float((parameter.detach() - plain[name].detach()).abs().max()))
    return worst


def _coordinator(model: Student | Teacher) -> Any:
    optimizer = model.engine.optimizer
    return getattr(optimizer, "parameter_offload", optimizer).get_param_coordinator()


def _trace(model: Student | Teacher) -> str:
    return str(_coordinator(model)._PartitionedParameterCoordinator__trace_mode.name)


def _gathered(student: Student, teacher: Teacher | None) -> list[str]:
    """Names of parameters that are whole on this rank though nothing runs."""
    modules = [student.engine.module, *([] if teacher is None else [teacher.engine.module])]
    found = [n for m in modules for n, p in m.named_parameters() if p.ds_status.name != "NOT_AVAILABLE"]
    heads = [] if teacher is None else [p for p in teacher.head._head[:2] if p is not None]
    return found + ["teacher head" for p in heads if p.ds_status.name != "NOT_AVAILABLE"]
