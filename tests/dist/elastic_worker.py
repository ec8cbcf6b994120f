"""One rank of test_elastic.py: a process that reads its share of a run, notes what it got, and may be killed."""

from __future__ import annotations

import json
import os
import time
import zlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddk_ds.data.loader import MixtureDataset, interval_loader
from ddk_ds.data.readers import Readers
from ddk_ds.files import write_text
from ddk_ds.mixture.interval_state import IntervalState, interval_ids
from ddk_ds.mixture.order import DomainOrder


@dataclass(frozen=True)
class Topology:
    """How a start of the run reads."""

    world: int
    micro_batch: int
    num_workers: int = 0
    nodes: int = 1


@dataclass(frozen=True)
class Plan:
    """The run, the same in each of its starts."""

    roots: tuple[str, ...]
    """Directory of the data on each node."""
    names: tuple[str, ...]
    seed: int
    intervals: int
    steps: int
    """Optimizer steps of an interval."""
    global_batch: int
    checkpoint_steps: int
    step_s: float = 0.0
    """Seconds that a step takes beside its reading."""


def first_state(plan: Plan) -> IntervalState:
    """The run before its first interval."""
    dataset = MixtureDataset(plan.roots[0], plan.names)
    sizes = zip(dataset.names, dataset.sizes, dataset.shas, strict=True)
    domains: Any = [{"name": name, "num_samples": int(size), "sha": sha} for name, size, sha in sizes]
    return IntervalState.new(domains, seed=plan.seed, block=128)


def begin(state: IntervalState, plan: Plan) -> IntervalState:
    """The next interval, by proportions of its own."""
    weights = np.random.default_rng([plan.seed, state.interval + 1]).dirichlet(np.ones(len(plan.names)))
    return state.advance(weights, plan.steps * plan.global_batch)


def order_of(state: IntervalState, dataset: MixtureDataset) -> np.ndarray:
    """Global sample ids of the state's interval."""
    sized = zip(dataset.names, dataset.shard_sizes, strict=True)
    orders = [DomainOrder(name, sizes, state.seed, state.block) for name, sizes in sized]
    return interval_ids(orders, dataset.sample_offsets, state)


def run_rank(plan: Plan, topology: Topology, rank: int, folder: Path, barrier: Any) -> None:
    """Goes on from `folder`/state.json to the end of the run; a line of `folder`/rank<r>.txt for each micro-batch.

    A line is [interval, samples consumed before the step, number in the step, ids, checksums of the tokens].
    """
    os.setpgid(0, 0)  # its readers belong to it
    torch.set_num_threads(1)
    node = rank * topology.nodes // topology.world
    dataset = MixtureDataset(plan.roots[node], plan.names)
    readers = Readers(topology.num_workers)
    readers.start()
    state = IntervalState.from_json(json.loads((folder / "state.json").read_text()))
    step = 0
    with (folder / f"rank{rank}.txt").open("w") as lines:
        while not (state.done and state.interval == plan.intervals - 1):
            if state.done:
                state = begin(state, plan)
            ids = order_of(state, dataset)
            state = state.seal(ids)
            batches = interval_loader(
                dataset,
                ids,
                rank=rank,
                world=topology.world,
                micro_batch=topology.micro_batch,
                start_sample=state.consumed,
                readers=readers,
            )
            while not state.done:
                for number in range(plan.global_batch // (topology.world * topology.micro_batch)):
                    (batch,) = islice(batches, 1)
                    sums = [zlib.crc32(row.numpy().tobytes()) for row in batch["input_ids"]]
                    record = [state.interval, state.consumed, number, batch["sample_id"].tolist(), sums]
                    lines.write(json.dumps(record) + "\n")
                lines.flush()
                time.sleep(plan.step_s)
                state, step = state.consume(plan.global_batch), step + 1
                barrier.wait()  # as the reduction of the gradients
                if step % plan.checkpoint_steps == 0 or state.done:
                    if rank == 0:
                        write_text(folder / "state.json", json.dumps(state.to_json()))
                    barrier.wait()
            assert next(batches, None) is None, f"rank {rank}: samples are left"
    readers.close()
