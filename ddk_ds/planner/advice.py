"""What to change where a run does not fit: each change tried by the estimate itself. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ddk_ds.config import Config
from ddk_ds.planner.gpu_memory import MemoryPlan, changed, plan_memory
from ddk_ds.planner.gpus import Cluster
from ddk_ds.planner.plan_inputs import Models

MOST_NODES = 128


@dataclass(frozen=True)
class Advice:
    """One change, and what it gives."""

    change: str
    """As it is written on the command line."""
    nodes: int
    device_bytes: int
    host_bytes: int
    """Of a node."""
    fits: bool
    price: str
    """What it costs."""


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
    """Every single change; where none is enough, one on the other until the run fits; and more nodes."""
    singles = list(_changes(config, cluster, plan_memory(config, models, cluster)))
    tried = [_try(config, models, cluster, [change]) for change in singles]
    if any(one.fits for one in tried):
        return [*tried, *_more_nodes(config, models, cluster, [])]
    if config.train.micro_batch_samples > 1 and config.train.global_batch_samples % cluster.ranks == 0:
        # Dearer than to compute twice, cheaper than to offload.
        singles.insert(
            sum("gradient_checkpointing" in one.sections.get("student", {}) for one in singles), _micro_batch(1)
        )
    together: list[_Change] = []
    for change in singles:
        together.append(change)
        if len(together) > 1:
            tried.append(_try(config, models, cluster, _widened(config, models, cluster, together)))
            if tried[-1].fits:
                break
    tried += _more_nodes(config, models, cluster, [])
    return tried if any(one.fits for one in tried) else [*tried, *_more_nodes(config, models, cluster, together)]


def _micro_batch(samples: int) -> _Change:
    price = "gathers and the host's work come for fewer tokens at a time"
    return _Change({"train": {"micro_batch_samples": samples}}, price)


def _widened(config: Config, models: Models, cluster: Cluster, changes: list[_Change]) -> list[_Change]:
    """The changes, with the largest micro-batch in place of 1 that fits with the others."""
    most = plan_memory(changed(config, **_merged(changes)), models, cluster).max_dividing
    most = min(most, config.train.micro_batch_samples)
    return [_micro_batch(most) if most and "train" in one.sections else one for one in changes]


def _changes(config: Config, cluster: Cluster, now: MemoryPlan) -> Iterator[_Change]:
    if not config.student.gradient_checkpointing:
        price = "what is cheap in the student's layers is computed twice forward"
        yield _Change({"student": {"gradient_checkpointing": "selective"}}, price)
    if config.student.gradient_checkpointing is not True:
        yield _Change({"student": {"gradient_checkpointing": True}}, "the student's layers are computed twice forward")
    if 0 < now.max_dividing < config.train.micro_batch_samples:
        yield _micro_batch(now.max_dividing)
    if config.optimizer.offload == "none":
        yield _Change({"optimizer": {"offload": "cpu"}}, "gradients and weights cross PCIe, the host updates")
    if config.teacher is not None and config.teacher.offload_params == "none":
        yield _Change({"teacher": {"offload_params": "cpu"}}, "the teacher's shards cross PCIe for each micro-batch")


def _more_nodes(config: Config, models: Models, cluster: Cluster, changes: list[_Change]) -> list[Advice]:
    """The fewest nodes, by doubling, on which it fits with these changes; with none that fit, the most that were tried.

    A rank's samples of a step become fewer, so the micro-batch becomes smaller where it must.
    """
    found: list[Advice] = []
    nodes = 2 * cluster.nodes
    while nodes <= MOST_NODES:
        larger = replace(cluster, nodes=nodes)
        per_rank, rest = divmod(config.train.global_batch_samples, larger.ranks)
        if rest or not per_rank:
            break
        wanted = changed(config, **_merged(changes)).train.micro_batch_samples
        samples = next(n for n in range(min(wanted, per_rank), 0, -1) if per_rank % n == 0)
        smaller = [_micro_batch(samples)] if samples < wanted else []
        found = [_try(config, models, larger, [*changes, *smaller], nodes)]
        if found[0].fits:
            break
        nodes *= 2
    return found


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
