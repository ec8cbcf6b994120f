"""Checks of one machine, mostly without a run: shared memory, open files, temporary files, ports, free memory."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ddk_ds.command_line import CORES_PER_GPU
from ddk_ds.engine.memory_estimate import MEMORY_MARGIN, MemoryEstimate
from ddk_ds.train.preflight.rows import Row, judged

# DeepSpeed maps 66 MiB a rank on a CPU, NCCL tens of MB a rank between the GPUs of a node. Docker gives a container
# 64 MB.
SHM_BYTES_PER_RANK = 100_000_000
# NCCL and gloo hold sockets to many ranks, loaders hold shards open; some systems allow 1024 by default.
FEWEST_OPEN_FILES, ENOUGH_OPEN_FILES = 512, 4096
# Compilers (Triton, DeepSpeed's extensions) write temporary files.
LEAST_TMP_BYTES, ENOUGH_TMP_BYTES = 100_000_000, 1_000_000_000
DEFAULT_PORT = 29500


def shared_memory(local_ranks: int, directory: Path = Path("/dev/shm")) -> Row:
    """Return a row that fails if `directory` has less than SHM_BYTES_PER_RANK free for each rank of this node."""
    free, needed = shutil.disk_usage(directory).free, SHM_BYTES_PER_RANK * local_ranks
    found = f"{directory} has {size(free)} free; needed are {size(needed)}; ranks on the node: {local_ranks}"
    wanted = f"--shm-size={2 * needed // 10**6}m"
    fix = f"remove what ended jobs left there, mount it larger, or start the container with {wanted}"
    return judged("shared memory", found, fail=free < needed, fix=fix)


def open_files() -> Row:
    """Check the limit on the open files of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = f"ulimit -n {ENOUGH_OPEN_FILES} before the launcher (hard limit: {hard})"
    few = soft < FEWEST_OPEN_FILES
    return judged("open files", f"{soft:,} may be open", fail=few, warn=soft < ENOUGH_OPEN_FILES, fix=fix)


def temporary_files() -> Row:
    """Check the free space of the directory for temporary files (TMPDIR)."""
    directory = tempfile.gettempdir()
    free = shutil.disk_usage(directory).free
    few, warn = free < LEAST_TMP_BYTES, free < ENOUGH_TMP_BYTES
    fix = f"free some, at best {size(ENOUGH_TMP_BYTES)}, or set TMPDIR to another directory"
    return judged("temporary files", f"{directory} has {size(free)} free", fail=few, warn=warn, fix=fix)


def master_port() -> Row:
    """Check MASTER_PORT, at which ranks meet: it must be free, or, if a launcher started this rank, answer."""
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", DEFAULT_PORT))
    if "RANK" in os.environ:
        try:
            socket.create_connection((address, port), timeout=10).close()
        except OSError as error:
            fix = "open the port in the nodes' firewall, or let MASTER_ADDR name an interface that all nodes reach"
            return Row("port", "fail", f"MASTER_ADDR {address} port {port} cannot be reached: {error}", fix)
        return Row("port", "pass", f"{address} port {port} answers")
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError as error:
            fix = f"end what listens there (ss -ltnp 'sport = {port}'), or give the launcher another --master_port"
            return Row("port", "fail", f"MASTER_PORT {port} is not free: {error.strerror}", fix)
    return Row("port", "pass", f"{port} is free")


def device_memory(estimate: MemoryEstimate, device: torch.device, world_size: int) -> Row:
    """Compare the estimate for one rank with the free memory of its GPU."""
    free, total = torch.cuda.mem_get_info(device)
    return _memory("device memory", estimate.device_bytes, free, f"of {size(total)} free", estimate, world_size)


def host_memory(estimate: MemoryEstimate, device_type: str, world_size: int, local_ranks: int) -> Row:
    """Compare the estimate for all ranks of this node with the node's free memory.

    If the device is the CPU, this memory also holds the models.
    """
    needed = local_ranks * (estimate.total if device_type == "cpu" else estimate.host_bytes)
    free = available_bytes()
    return _memory("host memory", needed, free, f"available; ranks on the node: {local_ranks}", estimate, world_size)


def _memory(name: str, needed: int, free: int, free_of: str, estimate: MemoryEstimate, world_size: int) -> Row:
    largest = sorted(estimate.parts.items(), key=lambda part: -part[1])[:3]
    shown = ", ".join(f"{part} {size(taken)}" for part, taken in largest)
    found = f"estimated {size(needed)}, {size(free)} {free_of}; of {world_size} ranks each: {shown}, ..."
    fix = (
        "more ranks, train.micro_batch_samples lower, student.gradient_checkpointing: true, or "
        "optimizer.offload: cpu (without a launcher, --ranks and --nodes say how many there will be)"
    )
    return judged(name, found, fail=needed > free, warn=needed > MEMORY_MARGIN * free, fix=fix)


def cores(local: Sequence[set[int]], device_type: str, limit: float) -> Row:
    """Return a row that fails if a rank with a GPU has fewer than CORES_PER_GPU cores; others are not judged.

    Args:
        local: the cores that each rank of this node may run on, this one's first; they share what they have in common.
        limit: cores that the node's ranks may use at a time, from `core_limit`.
    """
    share = sum(1 / sum(core in other for other in local) for core in local[0])
    share = min(share, limit / len(local))
    found = f"{share:.3g} for each of the {len(local)} ranks of the node; a rank with a GPU needs {CORES_PER_GPU}"
    fix = (
        "ddk submit --cpus-per-task, or the container's --cpus; else a GPU waits for the threads that feed it "
        "(--no-preflight trains all the same)"
    )
    return judged("cores", found, fail=device_type == "cuda" and share < CORES_PER_GPU, fix=fix)


def compiler(device_type: str) -> Row:
    """Return a row that fails if a rank with a GPU cannot compile: Triton builds a launcher of each kernel in C."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h"  # not Debian's scheme, as in Triton
    missing = [
        *([] if found and shutil.which(found) else [f"C compiler ({found or 'no CC, gcc or clang'})"]),
        *([] if headers.is_file() else [str(headers)]),
    ]
    text = f"missing: {', '.join(missing)}" if missing else f"{found}, {headers}"
    fix = "install gcc and the headers of this Python (python3-dev), or set CC"
    return judged("compiler", text, fail=device_type == "cuda" and bool(missing), fix=fix)


def free_bytes(device: torch.device, local_ranks: int) -> int:
    """Return the free bytes of this rank's GPU, or its share of the host's memory if it computes on the CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_bytes() // local_ranks


def available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of memory that processes can still get, within the machine and all limits of this process."""
    meminfo = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
    free = [int(meminfo["MemAvailable"].split()[0]) * 1024]
    for group in _control_groups("memory", proc, groups):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
        ):
            try:
                bounds = [int((group / name).read_text()) for name in (limit, used)]
                pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                free.append(bounds[0] - bounds[1] + int(pages[cached]))
            except (OSError, KeyError, ValueError):  # another version, or no limit: "max"
                continue
    return min(free)


def core_limit(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the cores that the control groups of this process may use at a time; infinity if there is no limit."""
    limits = [float("inf")]
    for group in _control_groups("cpu", proc, groups):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # versions 2 and 1
            try:
                quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
            except (OSError, ValueError):  # another version, or no limit: "max"
                continue
            if quota > 0:  # version 1 says -1 for no limit
                limits.append(quota / period)
    return min(limits)


def _control_groups(controller: str, proc: Path, groups: Path) -> Iterator[Path]:
    """Yield the directories of this process's control groups that have that controller, from the inmost to the root.

    Slurm sets its limits in a group of the step, deep below the root. In a container a path can be the host's, of which
    only a part is visible: what is missing is passed over.
    """
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without control groups
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)  # version 2 has one hierarchy of all controllers, without a name
        if controllers and controller not in controllers.split(","):
            continue
        root = groups / controllers if controllers else groups
        inmost = root / path.lstrip("/")
        yield from (inmost, *(parent for parent in inmost.parents if parent.is_relative_to(root)))


def size(num_bytes: float) -> str:
    """Return bytes as text in kB, MB or GB (powers of 1000)."""
    unit, name = next(
        item for item in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if num_bytes >= item[0] or item[0] == 1e3
    )
    return f"{num_bytes / unit:.3g} {name}"
