"""Changes that make a run fit its devices, each tried by the estimate of memory itself. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ddk_ds.config import Config
from ddk_ds.engine.config_sizes import divides_heads
from ddk_ds.planner.gpu_memory import MemoryPlan, changed, plan_memory
from ddk_ds.planner.gpus import Cluster
from ddk_ds.planner.plan_inputs import Models

MOST_NODES = 128
"""Largest number of nodes that is tried."""


@dataclass(frozen=True)
class Advice:
    """One change, or several together, and the memory with it."""

    change: str
    """The change as it is written on the command line."""
    nodes: int
    device_bytes: int
    host_bytes: int
    """Bytes on the host of a node."""
    fits: bool
    price: str
    """Cost of the change, in words."""


@dataclass(frozen=True)
class _Change:
    sections: dict[str, dict[str, Any]]
    price: str

    @property
    def text(self) -> str:
        return " ".join(
            f"{section}.{key}={str(value).lower()}"
            for section, values in self.sections.items()
            for key, value in values.items()
        )


def advise(config: Config, models: Models, cluster: Cluster) -> list[Advice]:
    """Try every single change and more nodes; if no single change is enough, combine them until the run fits."""
    singles = list(_possible_changes(config, models, cluster, plan_memory(config, models, cluster)))
    tried = [_try(config, models, cluster, [change]) for change in singles]
    if any(advice.fits for advice in tried):
        return [*tried, *_more_nodes(config, models, cluster, [])]
    if config.train.micro_batch_samples > 1 and config.train.global_batch_samples % cluster.ranks == 0:
        # It costs more than computing twice, and less than offloading.
        num_checkpointing = sum(
            change.sections.get("student", {}).keys() == {"gradient_checkpointing"} for change in singles
        )
        singles.insert(num_checkpointing, _micro_batch(1))
    together: list[_Change] = []
    for change in singles:
        together.append(change)
        if len(together) > 1:
            tried.append(_try(config, models, cluster, _widened(config, models, cluster, together)))
            if tried[-1].fits:
                break
    tried += _more_nodes(config, models, cluster, [])
    return tried if any(advice.fits for advice in tried) else [*tried, *_more_nodes(config, models, cluster, together)]


def _micro_batch(samples: int) -> _Change:
    price = "the same gathers and work of the host for fewer tokens"
    return _Change({"train": {"micro_batch_samples": samples}}, price)


def _widened(config: Config, models: Models, cluster: Cluster, changes: list[_Change]) -> list[_Change]:
    """Return the changes, but with the largest micro-batch that fits together with the others instead of 1."""
    largest = plan_memory(changed(config, **_merged(changes)), models, cluster).max_dividing
    largest = min(largest, config.train.micro_batch_samples)
    return [_micro_batch(largest) if largest and "train" in change.sections else change for change in changes]


def _possible_changes(config: Config, models: Models, cluster: Cluster, now: MemoryPlan) -> Iterator[_Change]:
    """Yield every change that saves memory and is not made in the configuration yet, the cheapest first."""
    sharded: dict[str, Any] = {}
    if config.teacher is not None and config.teacher.place == "gpu":
        sharded = {"shard_within": "node"}
        yield _Change({"teacher": sharded}, "the teacher's layers are gathered from the GPUs of the node")
    if not config.student.gradient_checkpointing:
        price = "the cheap operations of the student's layers are computed twice"
        yield _Change({"student": {"gradient_checkpointing": "selective"}}, price)
    if config.student.gradient_checkpointing is not True:
        yield _Change({"student": {"gradient_checkpointing": True}}, "the student's forward pass is computed twice")
    if 0 < now.max_dividing < config.train.micro_batch_samples:
        yield _micro_batch(now.max_dividing)
    if not now.max_dividing and _can_share(config, models, ranks := 2 * config.train.sequence_parallel, cluster):
        price = "attention exchanges its queries, keys and values between the ranks of a sample"
        yield _Change({"train": {"sequence_parallel": ranks}}, price)
    if config.optimizer.offload == "none":
        yield _Change({"optimizer": {"offload": "cpu"}}, "gradients and weights cross PCIe, the host updates")
    if not now.max_dividing and config.student.offload_activations == "none":
        inputs: dict[str, Any] = {"gradient_checkpointing": True, "offload_activations": "cpu"}
        price = "computed twice, and the inputs of the student's layers cross PCIe to the host and back"
        yield _Change({"student": inputs}, price)
    if config.teacher is not None and config.teacher.offload_params == "none":
        price = "the teacher's shards cross PCIe for each micro-batch"
        yield _Change({"teacher": {**sharded, "offload_params": "cpu"}}, price)


def _can_share(config: Config, models: Models, ranks: int, cluster: Cluster) -> bool:
    """Return True if that many ranks of a node can share each sample: what the run itself would refuse is left out."""
    shapes = [model.shape for model in (models.student, models.teacher) if model is not None]
    per_rank, rest = divmod(config.train.global_batch_samples * ranks, cluster.ranks)
    fits = not rest and per_rank % config.train.micro_batch_samples == 0 and cluster.gpus_per_node % ranks == 0
    heads = all(divides_heads(ranks, shape.heads, shape.kv_heads) and shape.best_kernel != "eager" for shape in shapes)
    return fits and heads and not config.needs_whole_samples and config.data.sequence_length % ranks == 0


def _more_nodes(config: Config, models: Models, cluster: Cluster, changes: list[_Change]) -> list[Advice]:
    """Double the number of nodes until the run fits with these changes, and return the last attempt as a list of one.

    It is the largest cluster that was tried if none fits. The list is empty if twice as many nodes are too many, or
    cannot share the global batch equally. A rank has fewer samples on more nodes, so the micro-batch shrinks until it
    divides them.
    """
    tried: list[Advice] = []
    nodes = 2 * cluster.nodes
    while nodes <= MOST_NODES:
        larger = replace(cluster, nodes=nodes)
        per_rank, remainder = divmod(config.train.global_batch_samples * config.train.sequence_parallel, larger.ranks)
        if remainder or not per_rank:
            break
        wanted = changed(config, **_merged(changes)).train.micro_batch_samples
        samples = next(n for n in range(min(wanted, per_rank), 0, -1) if per_rank % n == 0)
        smaller = [_micro_batch(samples)] if samples < wanted else []
        tried = [_try(config, models, larger, [*changes, *smaller], nodes)]
        if tried[0].fits:
            break
        nodes *= 2
    return tried


def _try(config: Config, models: Models, cluster: Cluster, changes: list[_Change], nodes: int | None = None) -> Advice:
    memory = plan_memory(changed(config, **_merged(changes)), models, cluster)
    merged = _Change(_merged(changes), "; ".join(change.price for change in changes if change.price))
    words = [*([f"--nodes {nodes}"] if nodes is not None else []), *([merged.text] if changes else [])]
    price = "; ".join(filter(None, ["more GPUs, each with less to compute" if nodes is not None else "", merged.price]))
    return Advice(" ".join(words), cluster.nodes, memory.device_bytes, memory.host_bytes, memory.fits, price)


def _merged(changes: list[_Change]) -> dict[str, dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for change in changes:
        for section, values in change.sections.items():
            merged[section] = {**merged.get(section, {}), **values}
    return merged
