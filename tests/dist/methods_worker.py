"""The ranks of test_methods.py: a first step of each method on the engines, and the same in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from transformers import AutoModelForCausalLM

from ddk_ds.config import Config
from ddk_ds.engine.filters import filter_shape
from ddk_ds.engine.model_files import read_model
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.student import Student, load_student
from ddk_ds.engine.teacher import load_teacher
from ddk_ds.kernels import Options
from ddk_ds.methods import Method, make_method
from ddk_ds.train.step import StepMetrics, train_step
from tests.dist.tiny import VOCAB, save_model, tiny_config

SAMPLES, LENGTH, DOMAINS = 8, 24, 3
GAMMA, TEMPERATURE, WEIGHT = 0.7, 1.5, 0.6
PAIRS = [[0, 1], [1, 2]]
WEIGHTS = [0.5, 0.3, 0.2]


def first_step(runtime: Runtime, folder: str, method: str, divergence: str | None, progress: float) -> dict[str, Any]:
    """Return losses and gradients of one step of `method`, on the engines and in plain torch (on rank 0)."""
    comm, root = runtime.comm, Path(folder)
    if comm.rank == 0:
        save_model(root / "student", vocab=VOCAB + 6, tied=True, seed=1)
        save_model(root / "teacher", hidden=48, vocab=VOCAB + 19, tied=False, seed=2, num_hidden_layers=3)
    comm.barrier()
    config = _config(root, method, divergence)
    files = read_model(root / "student", "student.path")
    teacher_files = None if config.teacher is None else read_model(root / "teacher", "teacher.path")
    shape = filter_shape(config, files, teacher_files) if teacher_files and method.startswith("ted") else None
    teacher = None if teacher_files is None else load_teacher(config, teacher_files, VOCAB, comm, shape)
    student = load_student(config, files, VOCAB, comm, shape)
    start = {"weights": WEIGHTS, "sum": [0.0] * DOMAINS, "steps": 0} if method == "doremi_proxy" else {}
    method_object = make_method(config, teacher, Options(VOCAB, gamma=0.0, chunk_tokens=16), DOMAINS, start)
    metrics, gradients = _step(student, method_object, runtime, progress)
    frozen = [name for name, p in student.engine.module.named_parameters() if not p.requires_grad]
    if comm.rank:
        return {}
    plain = _plain(root, config, progress)
    theirs = plain.pop("gradients")
    # By name: the largest difference and the largest value.
    compared = {n: [float((g - theirs[n]).abs().max()), float(theirs[n].abs().max())] for n, g in gradients.items()}
    return {
        "ours": [metrics.loss, metrics.ce, metrics.kl],
        "gradients": compared,
        "plain_gradients": sorted(theirs),
        "frozen": frozen,
        "method_metrics": metrics.method,
        "state": method_object.state_dict(),
        "plain": plain,
    }


def _config(root: Path, method: str, divergence: str | None) -> Config:
    loss = {"gamma": GAMMA, "temperature": TEMPERATURE, "gamma_end": 0.1, "temperature_end": 3.0}
    sections: dict[str, Any] = {
        "method": method,
        "train": {"global_batch_samples": SAMPLES, "micro_batch_samples": 2},
        "optimizer": {"clip_norm": 0.0},
        "loss": loss | ({} if divergence is None else {"divergence": divergence}),
        "ted": {"layers": PAIRS, "weight": WEIGHT, "filters": str(root / "filters.safetensors")},
    }
    if method != "ted":
        del sections["ted"]["filters"]
    else:
        _save_filters(root / "filters.safetensors")
    return tiny_config(root, **sections, **({"teacher": None} if method == "cpt" else {}))


def _save_filters(path: Path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)
    widths = {"student": 32, "teacher": 48}
    values = {f"{m}.{i}.weight": torch.randn(48, w, generator=generator) / 7 for m, w in widths.items() for i in (0, 1)}
    save_file(values, path)


def _samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCAB, (SAMPLES, LENGTH), generator=generator), torch.arange(SAMPLES) % DOMAINS


def _step(
    student: Student, method: Method, runtime: Runtime, progress: float
) -> tuple[StepMetrics, dict[str, torch.Tensor]]:
    """Run a step of two micro-batches a rank; return its metrics and the gradients that the optimizer gets."""
    comm = runtime.comm
    samples, domains = _samples()
    batches: Any = [
        {"input_ids": rows[comm.rank], "domain": labels[comm.rank], "sample_id": labels[comm.rank]}
        for rows, labels in zip(samples.reshape(2, 2, 2, LENGTH), domains.reshape(2, 2, 2), strict=True)
    ]
    gradients: dict[str, torch.Tensor] = {}
    update = student.update

    def watched(learning_rate: float, numbers: torch.Tensor) -> tuple[float, list[float]]:
        for name, parameter in student.engine.module.named_parameters():
            if parameter.requires_grad:
                grad = safe_get_full_grad(parameter)
                gradients[name] = torch.zeros(parameter.ds_shape) if grad is None else grad.clone()
        return update(learning_rate, numbers)

    student.update = watched  # type: ignore[method-assign]
    options: Any = {"learning_rate": 1e-3, "progress": progress, "num_domains": DOMAINS, "device": runtime.device}
    return train_step(student, method, batches, comm=comm, **options), gradients


def _plain(root: Path, config: Config, progress: float) -> dict[str, Any]:
    """Compute the same step without DeepSpeed, chunks or shards."""
    samples, domains = _samples()
    student = AutoModelForCausalLM.from_pretrained(root / "student")
    teacher = AutoModelForCausalLM.from_pretrained(root / "teacher").requires_grad_(False)
    ours, theirs = _watched(student, [p[0] for p in PAIRS]), _watched(teacher, [p[1] for p in PAIRS])
    logits, target = (m(samples).logits[:, :-1, :VOCAB] for m in (student, teacher))
    labels = samples[:, 1:]
    token_ce = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    ce, kl = token_ce.mean(), torch.zeros(())
    trained = {_root_name(name): p for name, p in student.named_parameters()}
    result: dict[str, Any] = {}
    if config.method == "doremi_proxy":
        means = torch.stack([token_ce[domains == i].mean() for i in range(DOMAINS)])
        loss = (torch.tensor(WEIGHTS) * means).sum()
        result["weights"] = _doremi_weights(token_ce, target, labels, domains)
    elif config.method == "ted_filters":
        filters = _new_filters(config.seed)
        outputs = [_filtered(filters[f"filters.student.{i}.weight"], ours[i]) for i in (0, 1)]
        outputs += [_filtered(filters[f"filters.teacher.{i}.weight"], theirs[i]) for i in (0, 1)]
        head = teacher.lm_head.weight[:VOCAB]
        loss = torch.stack([F.cross_entropy((o[:, :-1] @ head.T).transpose(1, 2), labels) for o in outputs]).mean()
        ce, trained = loss, filters
    else:
        gamma = GAMMA + (0.1 - GAMMA) * progress
        t = TEMPERATURE + (3.0 - TEMPERATURE) * progress
        loss = ce
        if config.method != "cpt":
            kl = _divergence(config.loss.divergence, (logits / t).log_softmax(-1), (target / t).log_softmax(-1))
            loss = ce + gamma * t**2 * kl
        if config.method == "ted":
            mse, filters = _mse(root, ours, theirs)
            loss, trained = loss + WEIGHT * mse, trained | filters
            result["mse"] = float(mse.detach())
    loss.backward()
    gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
    return {**result, "losses": [float(v.detach()) for v in (loss, ce, kl)], "gradients": gradients}


def _root_name(name: str) -> str:
    return name.replace("model.", "backbone.", 1).replace("lm_head.", "head.")


def _watched(model: Any, layers: list[int]) -> list[torch.Tensor]:
    """Return the list of the layers' outputs, which the next forward pass fills."""
    taken: list[torch.Tensor] = [torch.empty(0)] * len(layers)
    for place, layer in enumerate(layers):

        def hook(module: Any, inputs: Any, output: Any, place: int = place) -> None:
            taken[place] = output[0] if isinstance(output, tuple) else output

        model.model.layers[layer].register_forward_hook(hook)
    return taken


def _new_filters(seed: int) -> dict[str, torch.Tensor]:
    filters = {}
    for i in (0, 1):
        drawn = torch.randn(48, 32, generator=torch.Generator().manual_seed(seed + i)) / 32**0.5
        filters[f"filters.student.{i}.weight"] = drawn.requires_grad_()
        filters[f"filters.teacher.{i}.weight"] = torch.eye(48).requires_grad_()
    return filters


def _filtered(weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() @ weight.T


def _mse(
    root: Path, ours: list[torch.Tensor], theirs: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    values = load_file(root / "filters.safetensors")
    own = {f"filters.student.{i}.weight": values[f"student.{i}.weight"].requires_grad_() for i in (0, 1)}
    errors = [
        F.mse_loss(
            _filtered(own[f"filters.student.{i}.weight"], ours[i][:, :-1]),
            _filtered(values[f"teacher.{i}.weight"], theirs[i][:, :-1]),
        )
        for i in (0, 1)
    ]
    return torch.stack(errors).mean(), own


def _divergence(kind: str, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Compute the mean over tokens of D(teacher p, student q) from log-probabilities, as its papers define it."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.exp() * (a - b)).sum(-1).mean()

    def mixed(weight: float) -> torch.Tensor:
        return (weight * p.exp() + (1 - weight) * q.exp()).log()

    if kind == "jensen_shannon":
        return 0.5 * kl(p, mixed(0.5)) + 0.5 * kl(q, mixed(0.5))
    by_kind = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skew_forward_kl": lambda: kl(p, mixed(0.5)),
        "skew_reverse_kl": lambda: kl(q, mixed(0.5)),
        "total_variation": lambda: 0.5 * (p.exp() - q.exp()).abs().sum(-1).mean(),
    }
    return by_kind[kind]()


def _doremi_weights(
    token_ce: torch.Tensor, target: torch.Tensor, labels: torch.Tensor, domains: torch.Tensor
) -> list[float]:
    reference = F.cross_entropy(target.transpose(1, 2), labels, reduction="none")
    excess = (token_ce - reference).clamp(min=0)
    means = torch.stack([excess[domains == i].mean() for i in range(DOMAINS)]).double()
    moved = torch.tensor(WEIGHTS, dtype=torch.float64) * means.exp()
    return (0.999 * moved / moved.sum() + 0.001 / DOMAINS).tolist()


def first_steps(runtime: Runtime, folder: str, cases: list[tuple[str, str | None, float]]) -> list[dict[str, Any]]:
    """Run `first_step` for each case (method, divergence, progress) in turn."""
    return [first_step(runtime, folder, *case) for case in cases]
