"""Several hosts on this machine: network namespaces with addresses, /dev/shm and TMPDIR of their own, on one bridge."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

INSTALL = "apt-get install -y slurm-wlm munge iproute2 pdsh openssh-server"
INTERFACE = "eth0"


@dataclass(frozen=True)
class Host:
    """One of them."""

    name: str
    namespace: str
    address: str
    tmp: Path

    def command(self, *command: str) -> list[str]:
        """The command line that runs `command` there."""
        # Not `ip netns exec`: that mounts another /sys, in which slurmd finds no cgroups.
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--mount", "sh", "-c"]
        return [*enter, 'mount -t tmpfs tmpfs /dev/shm && TMPDIR=$0 exec "$@"', str(self.tmp), *command]

    def cut(self) -> None:
        """Take its cable out."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, "down")

    def ranks(self) -> list[str]:
        """The process ids of the ranks that run there."""
        pids = _ip("netns", "pids", self.namespace).split()
        commands = {pid: Path(f"/proc/{pid}/cmdline") for pid in pids}
        return [pid for pid, path in commands.items() if path.exists() and b"distill_rank" in path.read_bytes()]

    def kill(self) -> None:
        """SIGKILL to all that runs there."""
        for _ in range(3):  # what was being forked
            for pid in _ip("netns", "pids", self.namespace).split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue


def need(*tools: str) -> None:
    """Skip the test where it cannot run, and say what would change that."""
    if os.geteuid() != 0:
        pytest.skip("needs root: for network namespaces and daemons of its own")
    missing = [tool for tool in tools if shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: {INSTALL}")


@contextmanager
def hosts(folder: Path, count: int = 2) -> Iterator[list[Host]]:
    """`count` hosts that reach one another and, at the network's .254, this one. Ends what still runs there."""
    need("ip", "nsenter", "unshare")
    tag = f"{os.getpid() % 1_000_000:x}"
    network = f"10.{64 + os.getpid() % 128}.{os.getpid() // 128 % 256}"
    bridge = f"ddkb{tag}"
    with ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{network}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        result = []
        for number in range(1, count + 1):
            host = Host(f"node{number}", f"ddk{tag}n{number}", f"{network}.{number}", folder / f"tmp{number}")
            host.tmp.mkdir(parents=True)
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "del", host.namespace)
            # The kernel removes a namespace's links some time after `ip netns del`; a removal by name is done at once.
            outer = f"ddkv{tag}{number}"
            _connect(host, bridge, outer)
            stack.callback(_ip, "link", "del", outer)
            stack.callback(host.kill)
            result.append(host)
        yield result


def _connect(host: Host, bridge: str, outer: str) -> None:
    inside = ("-n", host.namespace)
    _ip("link", "add", outer, "type", "veth", "peer", "name", INTERFACE, "netns", host.namespace)
    _ip("link", "set", outer, "master", bridge, "up")
    _ip(*inside, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
    _ip(*inside, "link", "set", INTERFACE, "up")
    _ip(*inside, "link", "set", "lo", "up")


def _ip(*arguments: str) -> str:
    command: Sequence[str] = ("ip", *arguments)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
