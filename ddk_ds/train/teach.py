"""Filling a cache of the teacher ahead of all runs: the teacher alone goes over the samples that are not there yet."""

from __future__ import annotations

import time
from itertools import islice
from typing import Any

import numpy as np
import torch

from ddk_ds.comm import call_together
from ddk_ds.config import Config
from ddk_ds.data.loader import MicroBatch, MixtureDataset, interval_loader
from ddk_ds.data.readers import Readers
from ddk_ds.data.teacher_place import check_room
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.stage_clock import StageClock
from ddk_ds.engine.transfers import to_device
from ddk_ds.errors import TemporaryError
from ddk_ds.methods import Batch, CachedTeacher, next_token_labels
from ddk_ds.methods.cached_distillation import CachedDistillation
from ddk_ds.mixture.domain_vectors import perplexity
from ddk_ds.mixture.order import DomainOrder, Ids
from ddk_ds.train.inputs import Inputs
from ddk_ds.train.interruption import Interrupted, Interruption
from ddk_ds.train.progress import RunProgress
from ddk_ds.train.teacher_passes import settle_teacher
from ddk_ds.train.teacher_store import head_options, held_out, most_bytes, open_cache, start_teacher
from ddk_ds.train.validation import worse_than_guessing
from ddk_ds.train.watchdog import Watchdog


def fill_cache(
    config: Config,
    inputs: Inputs,
    identity: dict[str, Any],
    runtime: Runtime,
    watchdog: Watchdog,
    readers: Readers,
    samples: float,
) -> str:
    """Fill the cache with the samples of each domain that a run draws first, and measure the teacher. Collective.

    Args:
        samples: so many of each domain; infinity: all.

    Returns what was done, and the teacher's perplexity of what the cache has of each domain. Raises Interrupted on
    every rank if a signal came to one; what was computed until then is in the cache.
    """
    comm = runtime.comm
    config = settle_teacher(config, inputs, runtime)
    dataset = MixtureDataset(inputs.store, inputs.names, vocab_size=inputs.vocabulary.size, masked=inputs.masked)
    cached = open_cache(config, inputs, dataset, comm)
    assert cached is not None, "Config.check_teaching"
    missing = comm.broadcast_object(_missing(config, dataset, cached, samples) if comm.rank == 0 else None)
    call_together(comm, lambda: check_room(cached.store.place, most_bytes(config, inputs, len(missing))))
    validation = held_out(config, inputs, comm)
    watchdog.watch("models")
    progress, clock = RunProgress(comm.rank, 0, [], inputs.names), StageClock(runtime.device.type)
    options = head_options(config, inputs.vocabulary.size, runtime.device.type)
    teacher, ppl = start_teacher(config, inputs, identity, runtime, watchdog, validation, options, clock, progress)
    _raise_alarm({} if ppl is None else dict(zip(inputs.names, ppl.tolist(), strict=True)), inputs, progress)
    method = CachedDistillation(cached, teacher, config.loss, options)
    batches = interval_loader(
        dataset,
        missing,
        rank=comm.rank,
        world=comm.world_size,
        micro_batch=config.train.micro_batch_samples,
        readers=readers,
    )
    interruption = Interruption(comm, runtime.device)
    cached.store.place.give_up_when(lambda: interruption.signal != 0)
    size = config.teacher_pass_size
    passes, began = -(-len(missing) // (comm.world_size * config.train.micro_batch_samples * size)), time.monotonic()
    try:
        with interruption.listening(), progress.part("passes of the teacher", passes) as advance:
            for number in range(passes):
                _go_on(interruption, cached)
                watchdog.watch("step", number)
                method.fill([_batch(micro, runtime.device) for micro in islice(batches, size)])
                advance()
    except (Interrupted, TemporaryError):
        cached.store.place.give_up_when(lambda: True)
        cached.store.offer()
        raise
    watchdog.watch("end")
    cached.store.offer()
    call_together(comm, cached.store.check)
    rate = len(missing) * config.data.sequence_length / (time.monotonic() - began)
    added = f"{len(np.unique(missing)):,} samples added to {cached.store.place.location}, {rate:,.0f} tokens/s"
    return f"{added}: it has {_content(cached, dataset, inputs, progress)}"


def _go_on(interruption: Interruption, cached: CachedTeacher) -> None:
    """Raise Interrupted, or TemporaryError, if a signal came to a rank or a store did not take its part. Collective."""
    interruption.check()
    call_together(cached.comm, cached.store.check)


def _missing(config: Config, dataset: MixtureDataset, cached: CachedTeacher, samples: float) -> Ids:
    """Return the global ids to compute, in the order in which a run would draw them domain by domain.

    The last one stands there several times where the ranks' micro-batches would not be full.
    """
    parts: list[Ids] = []
    for name, sizes, first in zip(dataset.names, dataset.order_sizes, dataset.sample_offsets, strict=True):
        order = DomainOrder(name, sizes, config.seed)
        wanted = order.take(0, int(min(samples, order.num_samples)))
        parts.append(wanted[~np.isin(wanted, cached.store.known(name))] + first)
    missing = np.concatenate(parts)
    at_once = cached.comm.world_size * config.train.micro_batch_samples
    return np.concatenate([missing, np.repeat(missing[-1:], -len(missing) % at_once)])


def _batch(micro: MicroBatch, device: torch.device) -> Batch:
    ids, positions, targets = to_device(micro["input_ids"], device), micro.get("positions"), micro.get("targets")
    nothing = torch.zeros(0, dtype=torch.float64, device=device)
    labels, known = next_token_labels(ids, positions, targets), (micro["sample_id"], (), positions, None, targets)
    return Batch(ids, labels, micro["domain"], nothing, nothing, 0.0, *known)


def _content(cached: CachedTeacher, dataset: MixtureDataset, inputs: Inputs, progress: RunProgress) -> str:
    """Return the words that say what the cache has of each domain, and the teacher's perplexity of that."""
    store = cached.store
    store.refresh()
    sizes = zip(dataset.names, dataset.sizes, strict=True)
    counts = ", ".join(f"{len(store.known(name)):,} of {size:,} of {name}" for name, size in sizes)
    found = {name: perplexity(store.mean_loss(name)).item() for name in dataset.names if len(store.known(name))}
    _raise_alarm(found, inputs, progress)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    return f"{counts}. The teacher's perplexity of these samples, at temperature 1: {shown}"


def _raise_alarm(found: dict[str, float], inputs: Inputs, progress: RunProgress) -> None:
    """Say so if a teacher with these perplexities by domain knows less than nothing."""
    if warning := worse_than_guessing(np.array(list(found.values())), list(found), inputs.vocabulary.size):
        progress.say(f"alarm: {warning}")
