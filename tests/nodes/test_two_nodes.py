"""Two nodes: network namespaces with addresses, /dev/shm and TMPDIR of their own, a rank on each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.e2e.test_run import wait_for_step
from tests.nodes.hosts import INTERFACE, Host, hosts, need
from tools.bench.small_run import ROOT, without_clock, write_config

pytestmark = pytest.mark.long("two starts in network namespaces, a minute each")

PORT = 29411
OPTIONS = {"stop": {"steps": 40}, "mixture": {"interval_steps": 8}, "checkpoint": {"every_steps": 4}}


def start(host: Host, config: Path, rank: int, first: Host, world_size: int) -> subprocess.Popen[str]:
    """One rank on a host, as srun starts it."""
    env = os.environ | {
        **{"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": first.address, "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": INTERFACE},
    }
    command = host.command(sys.executable, "launch/distill.py", "--config", str(config))
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_a_node_is_lost_and_the_other_goes_on_alone(workspace: Path, tmp_path: Path) -> None:
    config, run_dir = write_config(workspace, tmp_path, **OPTIONS), tmp_path / "runs/run"
    with hosts(tmp_path) as (first, second):
        ranks = [start(host, config, rank, first, 2) for rank, host in enumerate((first, second))]
        wait_for_step(ranks[0], run_dir / "ledger.jsonl", 10)
        lost = time.monotonic()
        second.kill()
        output, _ = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode not in (0, None), output[-3000:]
        assert time.monotonic() - lost < 60
        ranks[1].communicate(timeout=10)
        alone = start(first, config, 0, first, 1)
        output, _ = alone.communicate(timeout=150)
    assert alone.returncode == 0, output[-5000:]
    assert "2 ranks wrote it, 1 go on" in output and "finished: 40 steps done" in output
    steps = [record["step"] for record in without_clock(run_dir) if record["kind"] == "step"]
    assert steps == list(range(1, 41))


@contextmanager
def ssh_daemons(machines: list[Host], folder: Path) -> Iterator[dict[str, str]]:
    """An sshd on each host, with keys of its own; the environment in which pdsh finds them."""
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    with ExitStack() as stack:
        for host in machines:
            options = [
                f"ListenAddress={host.address}",
                f"HostKey={key}",
                f"AuthorizedKeysFile={key}.pub",
                "PidFile=none",
            ]
            options += ["StrictModes=no", "UsePAM=no", "PermitRootLogin=yes", "PasswordAuthentication=no"]
            flags = [word for option in options for word in ("-o", option)]
            named = ["unshare", "--uts", "sh", "-c", 'hostname $0 && exec "$@"', host.name]
            daemon = subprocess.Popen(host.command(*named, "/usr/sbin/sshd", "-D", "-f", "/dev/null", *flags))
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
        quiet = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        yield {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": f"-i {key} {quiet}"}


SEES = """
import os
if "RANK" in os.environ:
    with open(os.environ["FI_SEEN"] + os.environ["RANK"], "w") as stream:
        stream.write(os.environ.get("HF_ODD", ""))
"""
ODD = 'a b; touch pwned $HOME `id` "q" %h'


def distil(machines: list[Host], config: Path, folder: Path, *overrides: str) -> list[str]:
    """The command that starts the run from a third machine."""
    hostfile = folder / "hosts"
    hostfile.write_text("".join(f"{host.address} slots=1\n" for host in machines))
    command = [str(Path(sys.executable).with_name("ddk")), "distill", "--hostfile", str(hostfile)]
    # DeepSpeed tries plain ssh first, which knows nothing of the key here.
    command += ["--no_ssh_check", "--master_addr", machines[0].address, "--master_port", str(PORT)]
    return [*command, "--config", str(config), *overrides]


def variables(folder: Path) -> dict[str, str]:
    """What the ranks must be told: which interface the nodes share, as the user's file says; and odd ones."""
    file, site = folder / "deepspeed_env", folder / "site"
    file.write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\n")
    site.mkdir()
    (site / "sitecustomize.py").write_text(SEES)
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return {"DS_ENV_FILE": str(file), "PYTHONPATH": path, "FI_SEEN": f"{folder}/seen", "HF_ODD": ODD}


def test_by_hostfile_and_pdsh(workspace: Path, tmp_path: Path) -> None:
    need("pdsh", "sshd", "ssh-keygen")
    config, output_dir = write_config(workspace, tmp_path, **OPTIONS), tmp_path / ODD
    with hosts(tmp_path) as machines, ssh_daemons(machines, tmp_path) as environment:
        environment = os.environ | environment | variables(tmp_path)
        command = distil(machines, config, tmp_path, f"output_dir={output_dir}")
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "finished: 40 steps done" in done.stdout
    assert (output_dir / "run/summary.json").is_file() and not (ROOT / "pwned").exists()
    assert [(tmp_path / f"seen{rank}").read_text() for rank in range(2)] == [ODD, ODD]


@pytest.mark.parametrize("lost", [1, 0])  # rank 0's host has the rendezvous store
def test_all_ends_when_a_wire_is_cut(workspace: Path, tmp_path: Path, lost: int) -> None:
    """No connection is closed, so a collective would wait for its timeout, and ssh for ever."""
    need("pdsh", "sshd", "ssh-keygen")
    options = {**OPTIONS, "stop": {"steps": 100_000}, "checkpoint": {"every_steps": 100_000}}
    config = write_config(workspace, tmp_path, **options)
    with hosts(tmp_path) as machines, ssh_daemons(machines, tmp_path) as environment:
        process = subprocess.Popen(
            distil(machines, config, tmp_path),
            cwd=ROOT,
            env=os.environ | environment | variables(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        wait_for_step(process, tmp_path / "runs/run/ledger.jsonl", 3)
        machines[lost].cut()
        cut = time.monotonic()
        output, _ = process.communicate(timeout=120)
        assert time.monotonic() - cut < 90, output[-3000:]
        assert process.returncode not in (0, None), output[-3000:]
        assert f"host node{lost + 1} (rank {lost}) has not answered for 45 s: it or its network is down" in output, (
            output[-3000:]
        )
        end = cut + 90
        while any(host.ranks() for host in machines):  # on the lost host too
            assert time.monotonic() < end, output[-3000:]
            time.sleep(0.5)
