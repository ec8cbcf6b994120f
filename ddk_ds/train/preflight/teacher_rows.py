"""The check of a run's cache of its teacher: what is there of what it draws, room for the rest, and how it is read."""

from __future__ import annotations

import math
import time

import numpy as np

from ddk_ds.config import Config
from ddk_ds.config.run_config import corpus_samples, total_steps
from ddk_ds.data.loader import MixtureDataset
from ddk_ds.data.teacher_cache import TeacherCache
from ddk_ds.data.teacher_place import open_place
from ddk_ds.mixture.order import DomainOrder
from ddk_ds.train.inputs import Inputs
from ddk_ds.train.preflight.machine import size
from ddk_ds.train.preflight.rows import Row, judged
from ddk_ds.train.teacher_store import most_bytes, open_samples

_READ_S, _MOST_READ = 1.0, 64


def teacher_cache(config: Config, inputs: Inputs, ranks: int) -> Row:
    """Return a row about `teacher.cache`, which is set: it fails if missing samples have no room or no teacher at all.

    The run's draws are divided by the controller's proportions for a student that is equally good everywhere. It will
    decide otherwise, so with read_only some that seem to be missing are a warning.
    """
    assert config.teacher is not None and config.teacher.cache is not None
    section, name = config.teacher.cache, "teacher's cache"
    place = open_place(section.path, config.data)
    dataset = MixtureDataset(inputs.store, inputs.names, vocab_size=inputs.vocabulary.size)
    cache = open_samples(place, config, inputs, dataset)
    draws = _draws(config, inputs)
    shown, missing = [], 0
    for domain, of_shards, drawn in zip(dataset.names, dataset.order_sizes, draws, strict=True):
        order = DomainOrder(domain, of_shards, config.seed)
        wanted, known = order.take(0, min(drawn, order.num_samples)), cache.known(domain)
        there = int(np.isin(wanted, known).sum())
        missing += len(wanted) - there
        shown.append(f"{len(known):,} of {domain}, of about {len(wanted):,} that the run draws {there:,}")
    found = f"teacher.cache.path {section.path} has {'; '.join(shown)}{_rate(config, cache, ranks)}"
    if section.mode == "read_only":
        found += f"; mode is read_only, and {missing:,} samples are missing"
        fix = (
            f"ddk teach --samples {max(draws)} teacher.cache.mode=write_through fills it; or let the run write through"
        )
        if config.teacher.by_domain:
            fix = f"ddk teach --samples {max(draws)} fills it"
        return judged(name, found, fail=not cache.domains, warn=missing > 0, fix=fix)
    needed = most_bytes(config, inputs, missing)
    free = place.free_bytes()
    found += f"; {missing:,} go through the teacher, at most {size(needed)}"
    found += "" if free is None else f" of {size(free)} that are free"
    fix = "free space there, or give a directory on another disk"
    return judged(name, found, fail=free is not None and needed > free, fix=fix)


def _rate(config: Config, cache: TeacherCache, ranks: int) -> str:
    """Return the words about a short read of the cache; "" if it is empty."""
    total = sum(len(cache.known(domain)) for domain in cache.domains)
    if not total:
        return ""
    step = max(1, total // _MOST_READ)
    some = [(domain, number) for domain in cache.domains for number in cache.known(domain)[::step].tolist()]
    began, read = time.perf_counter(), 0
    for domain, number in some:
        cache.read(domain, number)
        read += 1
        if time.perf_counter() - began > _READ_S:
            break
    rate = read / (time.perf_counter() - began)
    of_step = config.train.global_batch_samples / ranks
    return (
        f"; a short read gives {rate:,.0f} samples/s ({size(rate * cache.num_bytes / total)}/s), so that the "
        f"{of_step:g} samples of a rank's step take {of_step / rate:.2g} s"
    )


def _draws(config: Config, inputs: Inputs) -> list[int]:
    """Return the number of samples that the run draws of each domain, by the proportions of a first interval."""
    sizes = {name: inputs.manifest.domains[name].train.samples for name in inputs.names}
    total = total_steps(config, corpus_samples(config.mixture, sizes)) * config.train.global_batch_samples
    ones = np.ones(len(sizes))
    return [math.ceil(total * share) for share in inputs.controller.start(ones, ones).proportions]
