"""`ddk prepare --engine slurm` on a real Slurm with two nodes: a task is killed, a node is lost, the command too."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from ddk_ds.data.engines import make_engine
from ddk_ds.data.prepare import Plan, prepare
from ddk_ds.data.prepare_parts import prepare_in_parts
from ddk_ds.data.recipe import load_recipe
from tests.nodes.hosts import Host, hosts
from tests.slurm.cluster import Cluster, cluster
from tests.unit.data.corpus import make_texts, write_recipe
from tests.unit.data.test_data_prepare import files_of, write_lines

pytestmark = pytest.mark.long("a controller, daemons, and a job for each of nine tasks, two minutes")

PLAN = Plan(32, validation_samples=7)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    with hosts(tmp_path_factory.mktemp("hosts")) as result:
        yield result


@pytest.fixture(scope="module")
def slurm(nodes: list[Host]) -> Iterator[Cluster]:
    with cluster(cpus=1, hosts=nodes) as result:
        yield result


def tasks(root: Path, stage: str) -> list[int]:
    """Return the processes of a stage's parts."""
    wanted = f"{root}/logs/{stage}/executor.pik".encode()
    found = [path for path in Path("/proc").glob("[0-9]*/cmdline") if wanted in _content(path).split(b"\0")]
    return [int(path.parent.name) for path in found if b"srun" not in _content(path)]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def test_tasks_that_are_killed_and_lost_run_again(
    slurm: Cluster, nodes: list[Host], workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    (tmp_path / "text").mkdir()
    for number in range(6):
        write_lines(tmp_path / f"text/{number}.jsonl", make_texts(number, 60))
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", {"a": {"sources": ["text/*.jsonl"]}}))
    tokenizer, root = workspace / "tokenizer", tmp_path / ".parts.partial"
    prepare(recipe, tokenizer, tmp_path / "one", PLAN)
    options = {"partition": "debug", "time": "00:20:00", "mem_per_cpu_gb": "2"}
    engine = make_engine("slurm", -1, options)
    ends: list[object] = []

    def run() -> None:
        prepare_in_parts(recipe, tokenizer, tmp_path / "parts", PLAN, engine, 3, block_bytes=1)
        ends.append(True)

    thread = Thread(target=run)
    thread.start()
    slurm.wait_for("a task of the keys", lambda: bool(tasks(root, "keys")))
    os.kill(tasks(root, "keys")[0], signal.SIGKILL)
    slurm.wait_for("a task of the tokens on each node", lambda: len(tasks(root, "tokens")) == 2, timeout_s=300)
    nodes[1].kill()
    slurm.run("scontrol", "update", "nodename=node2", "state=down", "reason=lost")
    thread.join(timeout=500)
    assert ends, slurm.logs()
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "one")
    assert not root.exists()
