"""A real Slurm on this machine: munged, slurmctld and slurmd without systemd, with key, ports and state of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from ddk_ds.commands import submit_command
from tests.nodes.hosts import Host, need
from tools.bench.small_run import ROOT

_CONF = """\
ClusterName=test
SlurmctldHost={hostname}({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
KillWait=20
MinJobAge=3600
SchedulerParameters=bf_interval=5,sched_min_interval=100000
SlurmdParameters=config_overrides
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """What tests ask of a running one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, check: bool = True) -> str:
        """What a command prints, one of Slurm's or one that calls them."""
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return done.stdout

    def submit(self, config: Path, *options: str, ranks: int = 2, nodes: int = 1, limit: str = "30") -> list[str]:
        """Submit a run by the project's command; numbers of the jobs."""
        size = ["--nodes", str(nodes), "--gpus-per-node", "0", "--ranks-per-node", str(ranks), "--time", limit]
        with patch.dict(os.environ, self.environment), redirect_stdout(StringIO()) as said:
            code = submit_command.main(["--config", str(config), *size, *options])
        assert code == 0, said.getvalue()
        last = said.getvalue().splitlines()[-1]
        return last.removeprefix("submitted: ").split("; ")[0].split()

    def show(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for(self, what: str, condition: Callable[[], bool], *, timeout_s: float = 120) -> None:
        """Until the condition holds."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {timeout_s} s\n{self.logs()}"
            time.sleep(0.1)

    def wait_for_end(self, job: str, *, timeout_s: float = 400) -> tuple[str, int]:
        """State and exit code of a job, when it has ended."""
        live = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
        self.wait_for(f"end of job {job}", lambda: self.show(job)["JobState"] not in live, timeout_s=timeout_s)
        shown = self.show(job)
        return shown["JobState"], int(shown["ExitCode"].split(":")[0])

    def start_requeued(self, job: str) -> None:
        """Wait until the job is in the queue again, and spare it the two minutes that Slurm holds it there."""

        def requeued() -> bool:
            shown = self.show(job)
            return shown["Restarts"] == "1" and shown["JobState"] == "PENDING"

        self.wait_for(f"requeue of job {job}", requeued, timeout_s=60)
        time.sleep(5)  # a node refuses a job that begins in the seconds in which it was ended there
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now")

    def logs(self) -> str:
        """The daemons' last words."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))


@contextmanager
def cluster(cpus: int, hosts: Sequence[Host] = ()) -> Iterator[Cluster]:
    """One node on the loopback, or a node on each host. Ends its jobs and its own daemons, and them alone."""
    need("munged", "slurmctld", "slurmd", "sbatch", "srun")
    with ExitStack() as stack:
        # A short path: a socket's may have a hundred characters.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        result = Cluster(folder)
        _configure(folder, cpus, hosts)
        munged = ["--foreground", "--force", "--key-file=munge.key", "--socket=munge.socket", "--pid-file=munge.pid"]
        _daemon(stack, result, "munged", *munged, "--log-file=munge.log", "--seed-file=munge.seed")
        result.wait_for("munged", (folder / "munge.socket").exists, timeout_s=60)
        _daemon(stack, result, "slurmctld", "-D")
        for number, host in enumerate(hosts or (None,), 1):
            _daemon(stack, result, "slurmd", "-D", "-N", f"node{number}", host=host)
        nodes = str(len(hosts) or 1)
        idle = ("sinfo", "--noheader", "--states=idle", "--format=%D")
        result.wait_for("idle nodes", lambda: result.run(*idle, check=False).strip() == nodes, timeout_s=120)
        try:
            yield result
        finally:
            _end_jobs(result)


def _configure(folder: Path, cpus: int, hosts: Sequence[Host]) -> None:
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    folder.chmod(0o755)
    hostname = socket.gethostname().split(".")[0]
    controller = hosts[0].address.rsplit(".", 1)[0] + ".254" if hosts else "127.0.0.1"
    ports = _free_ports(1 + (len(hosts) or 1))
    text = _CONF.format(folder=folder, hostname=hostname, controller=controller, port=ports[0])
    for number, host in enumerate(hosts or (None,), 1):
        where = f"NodeHostname={hostname} NodeAddr={host.address if host else '127.0.0.1'} Port={ports[number]}"
        text += f"NodeName=node{number} {where} CPUs={cpus} RealMemory=4000 State=UNKNOWN\n"
    (folder / "slurm.conf").write_text(text)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for item in sockets:
            item.bind(("", 0))
        return [item.getsockname()[1] for item in sockets]


def _daemon(stack: ExitStack, owner: Cluster, name: str, *arguments: str, host: Host | None = None) -> None:
    """Start a daemon in the foreground, as a child that the stack ends."""
    command = [f"/usr/sbin/{name}", *arguments]
    command = host.command(*command) if host else command
    log = stack.enter_context((owner.folder / f"{name}{len(list(owner.folder.glob('*.log')))}.log").open("w"))
    process = subprocess.Popen(command, cwd=owner.folder, env=owner.environment, stdout=log, stderr=log)
    stack.callback(process.wait)
    stack.callback(process.terminate)


def _end_jobs(owner: Cluster) -> None:
    jobs = owner.run("squeue", "--noheader", "--format=%A", check=False).split()
    if jobs:
        owner.run("scancel", "--full", "--signal=KILL", *jobs, check=False)
        owner.run("scancel", *jobs, check=False)
        end = time.monotonic() + 30
        while owner.run("squeue", "--noheader", check=False).strip() and time.monotonic() < end:
            time.sleep(0.2)
