"""One optimizer step: its dropout seed, the update from micro-batches, and its line of the ledger.

The seed is a pure function of the step, so that there is nothing of it to save or to restore.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch

from ddk_ds.comm import Comm
from ddk_ds.data.loader import MicroBatch
from ddk_ds.engine.flops import utilisation
from ddk_ds.engine.student import Student
from ddk_ds.engine.transfers import to_device
from ddk_ds.kernels import KDLoss
from ddk_ds.methods import IGNORE_INDEX, Batch, Method, own_labels


@dataclass(frozen=True)
class StepMetrics:
    """Means over the step's valid tokens on all ranks, the tokens it consumed, and this rank's time and memory."""

    loss: float
    ce: float
    kl: float
    grad_norm: float
    domain_tokens: list[int]
    """Valid tokens (N,) of the step, over all ranks."""
    method: dict[str, Any] = field(default_factory=dict)
    """The method's own metrics of the step, from `Method.end_step`."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each part of the step on this rank."""
    peaks: dict[str, int] = field(default_factory=dict)
    """Peak bytes of this rank's memory in each part."""
    allocator: dict[str, int] = field(default_factory=dict)
    """Bytes that this rank's GPU has reserved, and the allocator's failures in the step; {} on a CPU."""
    agreed: list[float] = field(default_factory=list)
    """The sums over all ranks of what `meanwhile` returned."""
    domain_losses: list[float] = field(default_factory=list)
    """(2N,) cross-entropies and then divergences of the step's tokens in nats, summed by domain over all ranks; [] if
    they were not asked for."""
    router_aux_loss: float | None = None
    """Mean over micro-batches of the routers' load-balancing loss, without its weight; None if it is not used."""


def train_step(
    student: Student,
    method: Method,
    micro_batches: Sequence[MicroBatch],
    *,
    learning_rate: float,
    progress: float,
    teacher_pass_size: int = 1,
    num_domains: int,
    domain_weights: Sequence[float] | None = None,
    by_domain: bool = False,
    device: torch.device,
    comm: Comm,
    meanwhile: Callable[[], list[float]] = list,
) -> StepMetrics:
    """Accumulate the gradients of this rank's micro-batches and update the student once. Collective.

    All that the host has to know of the step is reduced before the update and read once: a GPU may still be at the
    update when this returns (engine/student.py).

    A method divides its sums over valid tokens by the number of valid tokens in the complete step on all ranks (DoReMi:
    by that of each domain). So these numbers are reduced before the first backward pass. DeepSpeed averages gradients
    over ranks, so the loss is multiplied by the world size.

    Args:
        progress: share of the run's steps that are done, 0..1.
        teacher_pass_size: number of micro-batches that the teacher computes in one pass.
        domain_weights: (N,) factors of the losses of each domain's samples; None: all are 1. They do not enter the
            number of valid tokens that divides.
        by_domain: sum up the losses by domain, without those factors.
        meanwhile: work for the host while the device computes; returns numbers that are summed over the ranks with the
            step's.
    """
    clock = student.clock
    labels, domain_tokens = _labels(student, micro_batches, num_domains)
    with clock.waiting("sync"):
        domain_tokens = comm.all_reduce_sum(to_device(domain_tokens, device))
    sums = torch.zeros(3 if student.router is None else 4, dtype=torch.float64, device=device)
    batches = _batches(micro_batches, labels, domain_tokens, progress, domain_weights, device, by_domain)
    of_domains = torch.zeros(2 * num_domains if by_domain else 0, dtype=torch.float64, device=device)
    for first in range(0, len(batches), teacher_pass_size):
        group = batches[first : first + teacher_pass_size]
        with method.teacher_outputs(group) as teacher_outputs:
            for number, (batch, teacher_output) in enumerate(zip(group, teacher_outputs, strict=True), first + 1):
                result = method.loss(student, batch, teacher_output)
                terms = _terms(student, result, len(batches) * comm.world_size)
                student.backward(terms[0] * comm.world_size, last=number == len(batches))
                sums += torch.stack([part.detach().double() for part in terms])
                if by_domain:
                    of_domains += _sums_by_domain(result, batch.domain, num_domains)
    more = torch.tensor(meanwhile(), dtype=torch.float64)
    parts = [sums, to_device(method.step_sums(), device), to_device(more, device), of_domains * domain_tokens.sum()]
    with clock.waiting("sync"):
        reduced = comm.all_reduce_sum(torch.cat(parts))
    grad_norm, numbers = student.update(learning_rate, torch.cat([reduced, domain_tokens]))
    (loss, ce, kl, *of_router), of_method, agreed, losses, tokens = _split(numbers, [*map(len, parts), num_domains])
    metrics = method.end_step(of_method)
    measured = clock.take_seconds(), clock.take_peaks(), clock.take_allocator()
    counts = [int(count) for count in tokens]
    return StepMetrics(loss, ce, kl, grad_norm, counts, metrics, *measured, agreed, losses, *of_router)


def _labels(
    student: Student, micro_batches: Sequence[MicroBatch], num_domains: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the labels of each micro-batch, and this rank's number of valid tokens by domain, (N,) float64."""
    labels = [
        own_labels(student, micro["input_ids"], micro.get("positions"), micro.get("targets")) for micro in micro_batches
    ]
    domain_tokens = torch.zeros(num_domains, dtype=torch.float64)
    for micro_batch, label in zip(micro_batches, labels, strict=True):
        domain_tokens.index_add_(0, micro_batch["domain"], (label != IGNORE_INDEX).sum(1).double())
    return labels, domain_tokens


def _sums_by_domain(result: KDLoss, domain: torch.Tensor, num_domains: int) -> torch.Tensor:
    """Return a micro-batch's cross-entropies and divergences by domain, (2N,) float64, divided as the step's loss is.

    A product, and not scattered additions, whose order differs from run to run on a GPU.
    """
    assert result.token_ce is not None and result.token_kl is not None, "the batch asks for them"
    of_samples = torch.stack([result.token_ce, result.token_kl]).double().unflatten(1, (len(domain), -1)).sum(2)
    of_domain = torch.nn.functional.one_hot(domain, num_domains).double()
    return (of_samples @ to_device(of_domain, of_samples.device)).flatten()


def _batches(
    micro_batches: Sequence[MicroBatch],
    labels: Sequence[torch.Tensor],
    domain_tokens: torch.Tensor,
    progress: float,
    domain_weights: Sequence[float] | None,
    device: torch.device,
    by_token: bool,
) -> list[Batch]:
    """Return the micro-batches on the device, with the counts of their step and the weights of their samples."""
    weights = None if domain_weights is None else torch.tensor(domain_weights, dtype=torch.float32)
    num_valid = domain_tokens.sum().clamp(min=1)
    batches = []
    for micro, label in zip(micro_batches, labels, strict=True):
        ids, label = to_device(micro["input_ids"], device), to_device(label, device)
        known = micro["sample_id"], micro.get("said", ()), micro.get("positions")
        of_samples = None if weights is None else to_device(weights[micro["domain"]], device)
        batches.append(
            Batch(
                ids,
                label,
                micro["domain"],
                domain_tokens,
                num_valid,
                progress,
                *known,
                of_samples,
                micro.get("targets"),
                by_token,
            )
        )
    return batches


def _terms(student: Student, result: KDLoss, num_parts: int) -> list[torch.Tensor]:
    """Return a micro-batch's parts of the step's loss, CE and KL, and of the routers' loss if the student has one.

    The routers' loss of a step is the mean over its `num_parts` micro-batches on all ranks; the loss has it weighted.
    """
    if student.router is None:
        return [*result[:3]]
    balance = student.take_router_loss() / num_parts
    return [result.loss + (student.router.weight * balance).to(result.loss.dtype), *result[1:3], balance]


def _split(numbers: list[float], lengths: Sequence[int]) -> list[list[float]]:
    rest = iter(numbers)
    return [list(islice(rest, length)) for length in lengths]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout for one step, so that a resumed run draws the same without a saved generator."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def step_numbers(metrics: StepMetrics) -> dict[str, Any]:
    """Return the computed numbers of a step, which a seed determines; None in place of those that are not finite."""
    numbers = asdict(metrics)
    unused = [name for name in ("method", "router_aux_loss") if numbers[name] in ({}, None)]
    for name in ("seconds", "peaks", "allocator", "agreed", "domain_losses", *unused):
        del numbers[name]
    return {name: _finite(value) for name, value in numbers.items()}


def step_clock(metrics: StepMetrics, seconds: dict[str, float], flops: float) -> dict[str, Any]:
    """Return the numbers that depend on the machine: seconds by part, tokens/s, memory in 10^9 bytes, and the MFU.

    The MFU is the share of the GPU's peak throughput that the step used; None if the GPU's peak is not known.

    Args:
        seconds: those of the complete step ("step") and of work outside its parts.
        flops: floating-point operations of the step on one rank.
    """
    seconds = {**seconds, **metrics.seconds}
    peaks = {name: round(size / 1e9, 3) for name, size in metrics.peaks.items()}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    mfu = utilisation(flops, seconds["step"], name)
    return {
        **{f"{name}_s": round(value, 4) for name, value in seconds.items()},
        "tokens_per_s": round(sum(metrics.domain_tokens) / seconds["step"], 1),
        "mfu": None if mfu is None else round(mfu, 4),
        "peak_memory_gb": max(peaks.values()),
        "peak_gb": peaks,
        **_allocator_clock(metrics.allocator),
    }


def _allocator_clock(allocator: dict[str, int]) -> dict[str, float]:
    if not allocator:
        return {}
    reserved = round(allocator["reserved"] / 1e9, 3)
    return {"reserved_gb": reserved, "alloc_retries": allocator["retries"], "alloc_ooms": allocator["ooms"]}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
