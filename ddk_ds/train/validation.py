"""Perplexity by domain: exp of the exact mean loss per token over the held-out samples (l_S and l_T of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddk_ds.comm import Comm
from ddk_ds.data.loader import HeldOutBatch
from ddk_ds.engine.student import Student
from ddk_ds.engine.teacher import Teacher
from ddk_ds.kernels import Options
from ddk_ds.methods import IGNORE_INDEX, own_labels, token_losses
from ddk_ds.mixture.domain_vectors import perplexity

# For each domain its micro-batches, the same number on every rank.
ValidationBatches = Sequence[Sequence[HeldOutBatch]]


def count_micro_batches(batches: ValidationBatches) -> int:
    """Return the number of forward passes that `perplexities` makes on each rank."""
    return sum(len(domain_batches) for domain_batches in batches)


def perplexities(
    model: Student | Teacher,
    batches: ValidationBatches,
    *,
    options: Options,
    device: torch.device,
    comm: Comm,
    poll: Callable[[], None] = lambda: None,
    advance: Callable[[], None] = lambda: None,
) -> npt.NDArray[np.float64]:
    """Return the perplexity (N,) float64 of the model on each domain.

    Collective: every rank runs the same number of forward passes.

    Args:
        poll: called before each domain; an exception that it raises on all ranks ends the evaluation.
        advance: called after each micro-batch of this rank.
    """
    sums = torch.zeros(2, len(batches), dtype=torch.float64, device=device)
    with model.evaluating():
        for domain, domain_batches in enumerate(batches):
            poll()
            for batch in domain_batches:
                labels = own_labels(model, batch.input_ids, batch.positions, batch.targets)
                labels[~batch.real] = IGNORE_INDEX
                flat = labels.flatten().to(device)

                nll = partial(token_losses, labels=flat, options=options)
                sums[0, domain] += model(batch.input_ids.to(device), nll, batch.positions).sum(dtype=torch.float64)
                sums[1, domain] += (flat != IGNORE_INDEX).sum()
                advance()
    comm.all_reduce_sum(sums)
    return perplexity((sums[0] / sums[1]).cpu().numpy())


def worse_than_guessing(perplexities: npt.NDArray[np.float64], names: Sequence[str], vocab_size: int) -> str:
    """Return a warning if a teacher's perplexities (N,) are above `vocab_size`, that of equal probabilities, or ""."""
    worse = [f"{name} {value:,.0f}" for name, value in zip(names, perplexities, strict=True) if value > vocab_size]
    if not worse:
        return ""
    return (
        f"the teacher is worse than guessing: of {vocab_size:,} tokens, its perplexity is {', '.join(worse)}. Are its "
        "weights, config.json and tokenizer of one model, and is it a language model of this text?"
    )


# What the teacher's perplexities do not depend on. All else that a run's numbers depend on is part of their conditions,
# so that an option of a later version is too.
_NOT_THE_TEACHERS = (
    "method",
    "seed",
    "student.",
    "mixture.",
    "loss.",  # what the evaluation uses of it is in its own options
    "optimizer.",
    "stop.",
    "ted.",
    "doremi.",
    "data.domains",  # each domain has its own file
    "train.global_batch_samples",
    "content.student",
    "content.attention.student",
    "content.domains.",
    "content.by_domain",  # each domain's own teacher stands in the place of content.teacher
    "content.filters",
    "content.schedule",
    "init_as",
    "content.init_from",
)


def perplexity_conditions(identity: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the conditions of measuring the teacher: what the run's `identity` has of it, and `more`."""
    return {**{key: value for key, value in identity.items() if not key.startswith(_NOT_THE_TEACHERS)}, **more}
