"""Checks across ranks: what must be the same on all of them, and how fast they reach one another.

Every function that takes a `Job` or a `Comm` is collective.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddk_ds.comm import Comm, collectives
from ddk_ds.config import Config, to_yaml
from ddk_ds.files import nearest_existing
from ddk_ds.train.preflight.rows import Row, deadline, judged
from ddk_ds.version import versions

# Events and files of several nodes are compared by their times; certificates and leases fail at minutes of skew.
SKEW_WARN_S, SKEW_FAIL_S = 2.0, 60.0
_CLOCK_ROUNDS = 5
# A shared file system may show a new file to another node with a delay.
SEEN_WITHIN_S = 10.0
COLLECTIVE_S = 60.0
_REPEATS = 3
# Two sizes in bytes with which bandwidth is measured.
SIZES = {"cpu": (1 << 16, 1 << 22), "cuda": (1 << 20, 1 << 26)}


@dataclass(frozen=True)
class PlannedRanks:
    """The ranks of a run that a process without a launcher stands for."""

    ranks: int
    nodes: int | None = None
    """Number of nodes with as many ranks each; None if nobody said it."""
    on_gpus: bool = False
    """True if each rank will have a GPU, also if this machine has none."""


@dataclass(frozen=True)
class Job:
    """The ranks of this job; a process without a launcher stands for those of `planned`."""

    comm: Comm
    device: torch.device
    hosts: list[str]
    """Host name of each rank."""
    ranks: int
    local_ranks: int
    """Ranks on this node."""
    planned: PlannedRanks | None = None

    @property
    def device_type(self) -> str:
        """Return the type of the device that the run's ranks have."""
        return "cuda" if self.planned is not None and self.planned.on_gpus else self.device.type

    @classmethod
    def meet(cls, comm: Comm, device: torch.device, planned: PlannedRanks | None) -> Job:
        """Return the job of all ranks, which end with EXIT_TEMPORARY if one does not come. Collective.

        Args:
            planned: the ranks that a process without a launcher stands for; None for itself alone.
        """
        with deadline("all ranks meet", COLLECTIVE_S):
            places = comm.gather_objects((platform.node(), comm.local_rank))
        hosts = [host for host, _ in places]
        if comm.world_size == 1 and planned is not None:
            ranks, nodes = planned.ranks, planned.nodes
            local = ranks // nodes if nodes else min(ranks, torch.cuda.device_count() or ranks)
            return cls(comm, device, hosts, ranks, local, planned)
        starts = [rank for rank, (_, local) in enumerate(places) if local == 0] + [comm.world_size]
        local = next(end - start for start, end in pairwise(starts) if comm.rank < end)
        return cls(comm, device, hosts, comm.world_size, local)


def ranks_row(job: Job) -> Row:
    """Return the row that names the number of ranks and their nodes; it warns if the nodes had to be assumed."""
    nodes = list(dict.fromkeys(job.hosts))
    shown = ", ".join(nodes[:4]) + (", ..." if len(nodes) > 4 else "")
    if job.planned is not None:
        found = f"this process alone, for a run of {job.ranks} ranks, {job.local_ranks} on each node"
        assumed = job.planned.nodes is None and job.ranks > 1
        if assumed and job.device.type == "cuda":
            return Row("ranks", "pass", f"{found}, the GPUs of this one; --nodes says otherwise")
        found += ", which is assumed" if assumed else ""
        fix = "give --nodes: memory and disks of a node are compared with all of its ranks"
        return judged("ranks", found, fail=False, warn=assumed, fix=fix)
    return Row("ranks", "pass", f"{job.ranks} on {len(nodes)} node{'s' * (len(nodes) > 1)}: {shown}")


def same_versions(job: Job) -> Row:
    """Check that all ranks have the same versions of packages and the same files of ddk_ds."""
    found = {**versions(), "mosaicml-streaming": version("mosaicml-streaming"), "files of ddk_ds": _code_hash()}
    if job.device.type == "cuda":
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return same_as_rank_0(job, "versions", found, "install the same environment on every node")


def _code_hash() -> str:
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def same_devices(job: Job) -> Row:
    """Check that all nodes have the same type and number of devices."""
    found = {"device": job.device.type, "ranks on the node": str(job.local_ranks)}
    if job.device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(job.device)
        found["devices on the node"] = str(torch.cuda.device_count())
    return same_as_rank_0(job, "devices", found, "give every node the same number of GPUs of one type")


def local_cores(job: Job) -> list[set[int]]:
    """Return the cores that each rank of this node may run on, this rank's first."""
    mine = os.sched_getaffinity(0)
    if job.planned is not None:
        return [mine] * job.local_ranks
    all_cores = job.comm.gather_objects(sorted(mine))
    here = job.hosts[job.comm.rank]
    others = [rank for rank, host in enumerate(job.hosts) if host == here and rank != job.comm.rank]
    return [mine, *(set(all_cores[rank]) for rank in others)]


def same_configuration(job: Job, config: Config) -> Row:
    """Check that all ranks have the same resolved configuration, line by line."""
    text = to_yaml(config)
    found = {f"line {number}": line.strip() for number, line in enumerate(text.splitlines(), 1)}
    row = same_as_rank_0(job, "same configuration", found, "start every rank with the same file and overrides")
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Row(row.name, "pass", f"sha256 {digest}") if row.status == "pass" else row


def same_files(job: Job, fingerprints: dict[str, Any]) -> Row:
    """Check that all ranks have the same fingerprints of models, tokenizer and shards."""
    found = {key: str(value) for key, value in fingerprints.items()}
    row = same_as_rank_0(job, "same files on all ranks", found, "copy models and data anew to the nodes that differ")
    return Row(row.name, "pass", "models, tokenizer and shards") if row.status == "pass" else row


def same_as_rank_0(job: Job, name: str, found: dict[str, str], fix: str) -> Row:
    """Return a row that fails if this rank's `found` (name of a value -> value) differs from rank 0's. Collective."""
    first = job.comm.broadcast_object(found)
    differing = [key for key in sorted({**found, **first}) if found.get(key) != first.get(key)]
    shown = "; ".join(f"{key} is {found.get(key)}, on rank 0 {first.get(key)}" for key in differing[:3])
    return judged(name, shown or ", ".join(f"{key} {value}" for key, value in found.items()), fail=bool(shown), fix=fix)


def _now() -> float:
    return time.time()


def clocks(job: Job) -> Row:
    """Check that this rank's clock is close to that of rank 0."""
    stamps = []
    for _ in range(_CLOCK_ROUNDS):
        before = _now()
        job.comm.barrier()
        stamps.append((before, _now()))
    offset = clock_offset(job.comm.broadcast_object(stamps), stamps)
    found = f"{abs(offset):.3g} s {'ahead of' if offset > 0 else 'behind'} rank 0; warns from {SKEW_WARN_S:g} s"
    fix = "let NTP or chrony set the node's clock (chronyc tracking)"
    return judged("clocks", found, fail=abs(offset) > SKEW_FAIL_S, warn=abs(offset) > SKEW_WARN_S, fix=fix)


def clock_offset(first: Sequence[tuple[float, float]], mine: Sequence[tuple[float, float]]) -> float:
    """Return the seconds by which my clock is ahead of the first rank's; 0 if the bounds on it include 0.

    No rank leaves a barrier before all have come, so each barrier bounds the offset from both sides.

    Args:
        first, mine: times before and after each barrier, on the first rank and on mine.
    """
    low = max(before - after for (before, _), (_, after) in zip(mine, first, strict=True))
    high = min(after - before for (_, after), (before, _) in zip(mine, first, strict=True))
    return min(max(0.0, low), high) if low <= high else (low + high) / 2


def output_directory(job: Job, config: Config) -> Row:
    """Check that all ranks can write into a directory that rank 0 made and renamed, as they do for a checkpoint."""
    name = "output directory"
    parent = nearest_existing(Path(config.output_dir))
    fix = "let output_dir name a writable directory on a file system that all nodes share"
    comm = job.comm
    made, error = comm.broadcast_object(_make_and_rename(parent) if comm.rank == 0 else None)
    if not error:
        errors = comm.gather_objects(_write_into(made, comm.rank))
        rank = next((rank for rank, found in enumerate(errors) if found), None)
        if rank is not None:
            error = f"rank {rank} on {job.hosts[rank]}: {errors[rank]}"
        else:
            error = comm.broadcast_object(_unseen(made, comm.world_size) if comm.rank == 0 else None)
    if comm.rank == 0:
        shutil.rmtree(made, ignore_errors=True)
    found = f"output_dir {config.output_dir}: {error or 'written, renamed and seen by all ranks'}"
    return judged(name, found, fail=bool(error), fix=fix)


def _make_and_rename(parent: Path) -> tuple[Path, str]:
    final = parent.absolute() / f".preflight-{uuid.uuid4().hex}"
    partial = final.with_name(final.name + ".partial")
    try:
        partial.mkdir()
        partial.rename(final)
    except OSError as error:
        return final, f"{parent} cannot be written: {error.strerror}"
    return final, ""


def _write_into(directory: Path, rank: int) -> str:
    if not _within(SEEN_WITHIN_S, directory.is_dir):
        return f"what rank 0 wrote in {directory.parent} is not seen here within {SEEN_WITHIN_S:g} s: it is not shared"
    try:
        with (directory / f"rank-{rank}").open("w") as stream:
            stream.write("preflight")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return f"{directory.parent} cannot be written: {error.strerror}"
    return ""


def _unseen(directory: Path, count: int) -> str:
    if _within(SEEN_WITHIN_S, lambda: len(os.listdir(directory)) == count):
        return ""
    return f"of the {count} files that ranks wrote there rank 0 sees {len(os.listdir(directory))}"


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return holds


def measure_collectives(comm: Comm, device: torch.device, limit_s: float = COLLECTIVE_S) -> list[Row]:
    """Measure each kind of collective that a run uses, with two sizes; return rows with its time or its bandwidth.

    Takes seconds. If a collective takes longer than `limit_s`, the process names the ranks that did not come to it and
    ends with EXIT_TEMPORARY.
    """
    if comm.world_size == 1:
        return [Row("collectives", "pass", "one rank alone has none: under the launcher they are measured")]
    times: dict[str, list[float]] = {}
    for num_bytes in SIZES.get(device.type, SIZES["cuda"]):
        for name, call in collectives(comm, device, num_bytes).items():
            with deadline(f"{name} of {num_bytes:,} bytes", limit_s):
                times.setdefault(name, []).append(_seconds(call, device))
    with deadline("times of all ranks", limit_s):
        by_rank = comm.gather_objects(times)
    slowest = {name: np.max([of_rank[name] for of_rank in by_rank], axis=0).tolist() for name in times}
    return [_speed(name, seconds, device) for name, seconds in slowest.items()]


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    call()  # the first one opens connections
    _wait(device)
    started = time.perf_counter()
    for _ in range(_REPEATS):
        call()
    _wait(device)
    return (time.perf_counter() - started) / _REPEATS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _speed(name: str, seconds: list[float], device: torch.device) -> Row:
    if name in ("barrier", "broadcast_object", "gather_objects"):
        return Row(f"collective {name}", "pass", f"{min(seconds) * 1e3:.3g} ms")
    sizes = SIZES.get(device.type, SIZES["cuda"])
    shown = ", ".join(
        f"{size / 2**20:.3g} MiB in {time_s * 1e3:.3g} ms = {size / time_s / 1e9:.3g} GB/s"
        for size, time_s in zip(sizes, seconds, strict=True)
    )
    return Row(f"collective {name}", "pass", shown)
