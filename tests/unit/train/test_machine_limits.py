"""Limits of memory and cores in nested control groups, as Slurm and containers set them: fake trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddk_ds.train.preflight import machine
from ddk_ds.train.preflight.machine import available_bytes, core_limit, cores

GB = 10**9


class Tree:
    """Directories like /proc and /sys/fs/cgroup of a machine with 2,048 GB free, and a process in some groups."""

    def __init__(self, folder: Path, *own: str) -> None:
        self.proc, self.groups = folder / "proc", folder / "cgroup"
        self.write("proc/meminfo", "MemTotal: 2100000000 kB\nMemAvailable: 2000000000 kB\n", folder)
        self.write("proc/self/cgroup", "\n".join(own) + "\n", folder)

    def write(self, name: str, text: str, root: Path | None = None) -> None:
        path = (root or self.groups) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def memory_2(self, group: str, limit: str, used: int, cached: int) -> None:
        self.write(f"{group}/memory.max", f"{limit}\n")
        self.write(f"{group}/memory.current", f"{used}\n")
        self.write(f"{group}/memory.stat", f"anon 5\ninactive_file {cached}\n")

    def memory_1(self, group: str, limit: int, used: int, cached: int) -> None:
        self.write(f"{group}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{group}/memory.usage_in_bytes", f"{used}\n")
        self.write(f"{group}/memory.stat", f"inactive_file 1\ntotal_inactive_file {cached}\n")

    @property
    def free(self) -> int:
        return available_bytes(self.proc, self.groups)

    @property
    def cores(self) -> float:
        return core_limit(self.proc, self.groups)


JOB = "system.slice/slurmstepd.scope/job_7"


def test_version_2(tmp_path: Path) -> None:
    """The limit of Slurm's job is three levels above the process's own group, which has none."""
    tree = Tree(tmp_path, f"0::/{JOB}/step_0/user/task_0")
    assert tree.free == 2_000_000_000 * 1024 and tree.cores == float("inf")
    tree.memory_2(f"{JOB}/step_0/user/task_0", "max", 1 * GB, 0)
    tree.memory_2(JOB, str(32 * GB), 3 * GB, 1 * GB)
    tree.write(f"{JOB}/step_0/cpu.max", "max 100000\n")
    tree.write(f"{JOB}/cpu.max", "350000 100000\n")
    assert (tree.free, tree.cores) == (30 * GB, 3.5)
    tree.memory_2(f"{JOB}/step_0", str(16 * GB), 2 * GB, 0)  # the smallest counts
    assert tree.free == 14 * GB


def test_version_1(tmp_path: Path) -> None:
    """Each controller has a hierarchy of its own."""
    job = "slurm/uid_1000/job_7"
    tree = Tree(
        tmp_path,
        "9:name=systemd:/",
        f"4:memory:/{job}/step_0",
        f"3:cpu,cpuacct:/{job}/step_0/task_0",
        "2:cpuset:/",
        "0::/",
    )
    tree.memory_1("memory", 9223372036854771712, 90 * GB, 0)  # no limit
    tree.memory_1(f"memory/{job}/step_0", 40 * GB, 2 * GB, 0)
    tree.memory_1(f"memory/{job}", 32 * GB, 3 * GB, 1 * GB)
    tree.write(f"cpu,cpuacct/{job}/cpu.cfs_quota_us", "-1\n")
    tree.write("cpu,cpuacct/cpu.cfs_quota_us", "800000\n")
    tree.write("cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert (tree.free, tree.cores) == (30 * GB, 8.0)


def test_the_hosts_path_in_a_container(tmp_path: Path) -> None:
    """The container sees its own group as the root; the process's path is that of the host."""
    tree = Tree(tmp_path, "0::/docker/0123/../..")
    tree.memory_2(".", str(8 * GB), 1 * GB, 0)
    tree.write("cpu.max", "200000 100000\n")
    assert (tree.free, tree.cores) == (7 * GB, 2.0)


def test_this_machine() -> None:
    assert 0 < available_bytes() < 1 << 50 and core_limit() > 0


@pytest.mark.parametrize(
    ("local", "limit", "share"),
    [
        ([{0}, {1}], 99.0, "1"),  # Slurm's default: one core a task
        ([set(range(16))] * 2, 99.0, "8"),  # one launcher's ranks share all cores
        ([set(range(16))] * 2, 10.0, "5"),  # of which the container may use 10 at a time
        ([set(range(8)), set(range(8, 16))], 99.0, "8"),
        ([set(range(12))] * 2, 99.0, "6"),
    ],
)
def test_cores_of_a_rank(local: list[set[int]], limit: float, share: str) -> None:
    row = cores(local, "cuda", limit)
    assert row.found.startswith(f"{share} for each of the 2 ranks of the node; ")
    assert row.status == ("pass" if float(share) >= machine.CORES_PER_GPU else "fail")
    assert row.status == "pass" or "--cpus-per-task" in row.fix
    assert cores(local, "cpu", limit).status == "pass"
