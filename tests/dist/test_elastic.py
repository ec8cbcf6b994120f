"""The order on any topology, and a run that is killed again and again and goes on elsewhere: real processes, SIGKILL.

The ranks stand for training processes: they read by ddk_ds.data.loader and note what they got. A barrier is their
collective; nothing of a killed start is used but its last checkpoint, the state as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from ddk_ds.data.loader import MixtureDataset
from ddk_ds.mixture.interval_state import IntervalState
from tests.dist.elastic_worker import Plan, Topology, begin, first_state, order_of, run_rank

NAMES = ("python", "cpp", "mathematics")
GLOBAL_BATCH = 24
READERS: dict[str, dict[str, Any]] = {
    "no workers": {},
    "workers": {"num_workers": 2},
}


@pytest.fixture(scope="module")
def plan(workspace: Path) -> Plan:
    shards = str(workspace / "shards")
    return Plan((shards, shards), NAMES, seed=5, intervals=2, steps=3, global_batch=GLOBAL_BATCH, checkpoint_steps=1)


def living(group: int | None) -> list[psutil.Process]:
    """The processes of a group that have not ended; nobody may wait for an orphan that has."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Start:
    """One start of a run: its ranks, each a process group with its reading processes."""

    def __init__(self, plan: Plan, topology: Topology, state: dict[str, Any], folder: Path) -> None:
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps(state))
        self.topology, self.folder, self.began = topology, folder, state
        context = multiprocessing.get_context("forkserver")  # ranks share what is imported, and none of our threads
        context.set_forkserver_preload(["pytest", "streaming.base.format", "tests.dist.elastic_worker"])
        self._barrier = context.Barrier(topology.world)  # its semaphores go when this reference goes
        self.ranks = [
            context.Process(target=run_rank, args=(plan, topology, rank, folder, self._barrier))
            for rank in range(topology.world)
        ]
        for rank in self.ranks:
            rank.start()

    def steps_seen(self) -> int:
        """Steps that rank 0 has behind it, or is in."""
        path = self.folder / "rank0.txt"
        lines = path.read_text().splitlines() if path.is_file() else []
        return len({tuple(json.loads(line)[:2]) for line in lines if line.endswith("]]")})

    def wait(self, timeout_s: float) -> None:
        """To the end of the run."""
        end = time.monotonic() + timeout_s
        while any(rank.is_alive() for rank in self.ranks) and time.monotonic() < end:
            if any(rank.exitcode for rank in self.ranks):
                break
            time.sleep(0.01)
        assert [rank.exitcode for rank in self.ranks] == [0] * len(self.ranks), f"{self.topology}"

    def kill(self, rng: np.random.Generator) -> None:
        """SIGKILL to one rank, and to the others at once or a little later; their readers find out by themselves."""
        for number in rng.permutation(len(self.ranks)).tolist():
            rank = self.ranks[number]
            assert rank.pid is not None
            if rank.is_alive():
                os.kill(rank.pid, signal.SIGKILL)
            time.sleep(float(rng.choice([0.0, 0.02])))
        for rank in self.ranks:
            rank.join(30)
            assert rank.exitcode == -signal.SIGKILL, f"{self.topology}: ended with {rank.exitcode} before its kill"
        end = time.monotonic() + 60
        while left := [process for rank in self.ranks for process in living(rank.pid)]:
            assert time.monotonic() < end, f"{self.topology}: {left} outlived their rank"
            time.sleep(0.05)

    def clean_up(self) -> None:
        """No process is left behind, whatever happened."""
        for rank in self.ranks:
            if rank.pid is not None:
                try:
                    os.killpg(rank.pid, signal.SIGKILL)
                except ProcessLookupError:
                    rank.kill()
                rank.join(10)

    def state(self) -> dict[str, Any]:
        """The last checkpoint."""
        record: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return record

    def read(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """What the checkpoint holds of it: (interval, samples before the step) -> (id, checksum) in global order."""
        state = self.state()
        rows = []
        for rank in range(self.topology.world):
            path = self.folder / f"rank{rank}.txt"
            for line in path.read_text().splitlines() if path.is_file() else []:
                if line.endswith("]]"):  # else the kill came in the middle of it
                    interval, consumed, number, ids, sums = json.loads(line)
                    rows.append((interval, consumed, number, rank, list(zip(ids, sums, strict=True))))
        steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for interval, consumed, _, _, samples in sorted(rows):
            if (interval, consumed) < (state["interval"], state["consumed"]):
                steps.setdefault((interval, consumed), []).extend(samples)
        return steps


@pytest.fixture
def start() -> Iterator[Callable[..., Start]]:
    """Starts runs; ends what is left of them."""
    started: list[Start] = []

    def begin_one(*arguments: Any) -> Start:
        started.append(Start(*arguments))
        return started[-1]

    yield begin_one
    for one in started:
        one.clean_up()


def expected(plan: Plan) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """The run as one process reads it, sample by sample, without a loader."""
    dataset = MixtureDataset(plan.roots[0], plan.names)
    state, steps = first_state(plan), {}
    for _ in range(plan.intervals):
        state = begin(state, plan)
        ids = order_of(state, dataset).tolist()
        sums = [zlib.crc32(dataset[sample_id]["input_ids"].numpy().tobytes()) for sample_id in ids]
        for first in range(0, len(ids), plan.global_batch):
            last = first + plan.global_batch
            steps[state.interval, first] = list(zip(ids[first:last], sums[first:last], strict=True))
        state = state.consume(len(ids))
    return steps


def check_order(plan: Plan, topology: Topology, start: Callable[..., Start], folder: Path) -> None:
    """A whole run on this topology reads what one process reads, in the same order."""
    one = start(plan, topology, first_state(plan).to_json(), folder)
    one.wait(300)
    assert one.read() == expected(plan), f"{topology}"


@pytest.mark.parametrize(("world", "reader"), [(3, "no workers"), (2, "workers")])
def test_the_order_is_the_same(
    plan: Plan, start: Callable[..., Start], tmp_path: Path, world: int, reader: str
) -> None:
    check_order(plan, Topology(world, 24 // world // 2, **READERS[reader]), start, tmp_path / "run")


@pytest.mark.long("every reader on every topology; make test has two")
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("reader", READERS)
def test_the_order_is_the_same_everywhere(
    plan: Plan, start: Callable[..., Start], tmp_path: Path, world: int, reader: str
) -> None:
    workers = "num_workers" in READERS[reader]  # seconds for each rank: on two nodes at once
    for nodes in (1,) if world == 1 else (2,) if workers else (1, 2):
        topology = Topology(world, 24 // world // 2, **READERS[reader], nodes=nodes)
        check_order(plan, topology, start, tmp_path / f"{nodes}-nodes")


def test_the_node_plays_no_role(plan: Plan, start: Callable[..., Start], tmp_path: Path) -> None:
    """Two nodes, each with a directory of its own: ranks 0 and 1 read on the first, 2 on the second."""
    copy = str(shutil.copytree(plan.roots[0], tmp_path / "second"))
    two_nodes = replace(plan, roots=(plan.roots[0], copy))
    one = start(two_nodes, Topology(3, 4, nodes=2), first_state(plan).to_json(), tmp_path / "run")
    one.wait(120)
    assert one.read() == expected(plan)


def random_topology(rng: np.random.Generator, other_than: Topology | None) -> Topology:
    """Any that divides the batch; few ranks where each would start new interpreters."""
    while True:
        reader = READERS[list(READERS)[rng.integers(len(READERS))]]
        world = int(rng.integers(1, 3 if reader else 5))
        micro_batch = int(rng.choice([n for n in (1, 2, 3, 4, 6, 8, 12, 24) if GLOBAL_BATCH % (n * world) == 0]))
        topology = Topology(world, micro_batch, **reader)
        if other_than is None or (topology.world, topology.micro_batch) != (other_than.world, other_than.micro_batch):
            return topology


def kill_and_go_on(plan: Plan, kills: int, seed: int, start: Callable[..., Start], folder: Path) -> dict[str, int]:
    """One run, killed that many times at random moments, each time going on from its last checkpoint elsewhere."""
    rng = np.random.default_rng(seed)
    state, topology = first_state(plan).to_json(), None
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    figures = {"kills": 0, "in mid-interval": 0, "steps thrown away": 0}
    for number in range(kills + 1):
        topology = random_topology(rng, topology)
        one = start(plan, topology, state, folder / str(number))
        if number < kills:
            steps, late = int(rng.integers(0, 7)), float(rng.uniform(0, 3 * plan.step_s))
            end = time.monotonic() + 120
            while one.steps_seen() < steps and time.monotonic() < end:
                assert all(rank.is_alive() for rank in one.ranks), f"{topology}: a rank ended by itself"
                time.sleep(0.002)
            time.sleep(late)
            one.kill(rng)
            figures["kills"] += 1
        else:
            one.wait(400)
        state = one.state()
        kept = one.read()
        assert not set(kept) & set(found), "a step that a checkpoint holds was done again"
        found |= kept
        figures["steps thrown away"] += max(0, one.steps_seen() - len(kept))
        figures["in mid-interval"] += number < kills and 0 < state["consumed"] < plan.steps * plan.global_batch
    samples = Counter(sample for step in expected(plan).values() for sample in step)
    read = Counter(sample for step in found.values() for sample in step)
    figures |= {"lost": (samples - read).total(), "repeated": (read - samples).total()}
    assert found == expected(plan), figures
    assert IntervalState.from_json(state).done
    return figures


def test_killed_and_resumed_elsewhere(
    plan: Plan, start: Callable[..., Start], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    long = replace(plan, intervals=5, steps=7, checkpoint_steps=3, step_s=0.02)
    figures = kill_and_go_on(long, 2, 3, start, tmp_path)
    assert (figures["kills"], figures["lost"], figures["repeated"]) == (2, 0, 0)


@pytest.mark.long("12 kills, a minute; make test has two, and the fault campaign's are of complete runs")
@pytest.mark.timeout(1800)
def test_killed_again_and_again(
    plan: Plan, start: Callable[..., Start], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    kills = 12
    long = replace(plan, intervals=13, steps=9, checkpoint_steps=3, step_s=0.02, seed=1)
    figures = kill_and_go_on(long, kills, 1, start, tmp_path)
    assert figures["in mid-interval"] >= kills // 3 and figures["steps thrown away"]  # else little was tested
    for name, value in figures.items():
        record_property(name, value)
