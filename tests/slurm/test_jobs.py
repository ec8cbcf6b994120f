"""Runs on a real Slurm: to the end, interrupted and requeued, in a chain, on two nodes, in an array, cancelled."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.nodes.hosts import INTERFACE, hosts
from tests.slurm.cluster import Cluster, cluster
from tools.bench.small_run import without_clock, write_config

pytestmark = pytest.mark.long("a controller, daemons and a start for each job, a minute each")

# Enough steps that a signal finds the run at work.
OPTIONS = {"stop": {"steps": 60}, "mixture": {"interval_steps": 30}, "checkpoint": {"every_steps": 100}}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster(cpus=2) as result:
        yield result


@pytest.fixture(scope="module")
def whole(slurm: Cluster, workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run that nothing disturbed, on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    [job] = slurm.submit(write_config(workspace, folder, **OPTIONS))
    assert slurm.wait_for_end(job) == ("COMPLETED", 0), log(folder / "runs/run", job)
    return folder / "runs/run"


def log(run_dir: Path, job: str) -> str:
    """What a job of a run's first submission printed."""
    path = run_dir / f"slurm/1/{job}.log"
    return path.read_text() if path.is_file() else "no log"


def at_step(run_dir: Path, step: int) -> bool:
    """Whether the run has done that step."""
    ledger = run_dir / "ledger.jsonl"
    return ledger.is_file() and f'"step": {step},' in ledger.read_text()


def interrupt(slurm: Cluster, job: str, run_dir: Path, signal: str = "USR1", step: int = 3) -> None:
    """Send the batch script what Slurm sends it before the time limit."""
    slurm.wait_for(f"step {step} in {run_dir}", lambda: at_step(run_dir, step))
    slurm.run("scancel", "--batch", f"--signal={signal}", job)


def test_one_job_to_the_end(whole: Path) -> None:
    assert (whole / "summary.json").is_file()
    folder = whole / "slurm/1"
    assert {"config.yaml", "code.json", "job.sbatch", "ended"} <= {path.name for path in folder.iterdir()}
    assert (folder / "ended").read_text() == "0\n"


def test_interrupted_and_requeued(slurm: Cluster, whole: Path, workspace: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs/run"
    [job] = slurm.submit(write_config(workspace, tmp_path, **OPTIONS))
    interrupt(slurm, job, run_dir)
    slurm.start_requeued(job)
    assert slurm.wait_for_end(job) == ("COMPLETED", 0), f"{log(run_dir, job)}\n{slurm.logs()}"
    text = log(run_dir, job)
    assert "interrupted by SIGUSR1 and saved at step" in text and "resumed from" in text, text
    assert without_clock(run_dir) == without_clock(whole)


def test_chain(slurm: Cluster, whole: Path, workspace: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs/run"
    jobs = slurm.submit(write_config(workspace, tmp_path, **OPTIONS), "--chain", "3")
    interrupt(slurm, jobs[0], run_dir)
    ends = [slurm.wait_for_end(job) for job in jobs]
    assert ends == [("FAILED", 75), ("COMPLETED", 0), ("COMPLETED", 0)], log(run_dir, jobs[0])
    assert "resumed from" in log(run_dir, jobs[1])
    assert "submit anew" in log(run_dir, jobs[2])
    assert without_clock(run_dir) == without_clock(whole)


def test_two_nodes(whole: Path, workspace: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs/run"
    with hosts(tmp_path) as machines, cluster(cpus=1, hosts=machines) as slurm:
        config = write_config(workspace, tmp_path, **OPTIONS)
        [job] = slurm.submit(config, "--interface", INTERFACE, ranks=1, nodes=2)
        assert slurm.wait_for_end(job) == ("COMPLETED", 0), log(run_dir, job)
        assert slurm.show(job)["NodeList"] == "node[1-2]"
    assert [record["kind"] for record in without_clock(run_dir)] == [record["kind"] for record in without_clock(whole)]


@pytest.mark.parametrize("command", ["TERM to the batch script", "scancel"])
def test_cancelled_and_submitted_anew(
    slurm: Cluster, whole: Path, workspace: Path, tmp_path: Path, command: str
) -> None:
    run_dir = tmp_path / "runs/run"
    config = write_config(workspace, tmp_path, **OPTIONS)
    [job] = slurm.submit(config)
    if command == "scancel":
        slurm.wait_for("step 3", lambda: at_step(run_dir, 3))
        slurm.run("scancel", job)
        assert slurm.wait_for_end(job)[0] == "CANCELLED"
        slurm.wait_for("the end of the ranks", lambda: "ended with exit code" in log(run_dir, job), timeout_s=40)
    else:
        interrupt(slurm, job, run_dir, "TERM")
        assert slurm.wait_for_end(job) == ("FAILED", 75)
    assert "and saved at step" in log(run_dir, job)
    [again] = slurm.submit(config)
    assert slurm.wait_for_end(again) == ("COMPLETED", 0)
    assert "resumed from" in (run_dir / f"slurm/2/{again}.log").read_text()
    assert without_clock(run_dir) == without_clock(whole)


def test_array(slurm: Cluster, whole: Path, workspace: Path, tmp_path: Path) -> None:
    config = write_config(workspace, tmp_path, **OPTIONS)
    [array] = slurm.submit(config, "--array", "0-1%1", "--seed-from-task")
    runs = [tmp_path / f"runs/run-{task}" for task in range(2)]
    # One task is interrupted, and it alone is requeued, though the other may have the number of the whole array.
    interrupt(slurm, f"{array}_0", runs[0])
    slurm.start_requeued(f"{array}_0")
    ends = [slurm.wait_for_end(f"{array}_{task}") for task in range(2)]
    assert ends == [("COMPLETED", 0)] * 2
    assert [slurm.show(f"{array}_{task}")["Restarts"] for task in range(2)] == ["1", "0"]
    ledgers = [without_clock(run) for run in runs]
    assert ledgers[0] == without_clock(whole)  # seed 0
    assert ledgers[1] != ledgers[0]


def test_time_limit(slurm: Cluster, whole: Path, workspace: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs/run"
    options = {**OPTIONS, "stop": {"steps": 4000}, "mixture": {"interval_steps": 1000}}
    [job] = slurm.submit(write_config(workspace, tmp_path, **options), "--signal-seconds", "60", limit="2")
    slurm.start_requeued(job)
    slurm.wait_for("to resume", lambda: "resumed from" in log(run_dir, job), timeout_s=300)  # two starts
    assert "got USR1" in log(run_dir, job) and "interrupted by SIGUSR1 and saved" in log(run_dir, job)
    slurm.run("scancel", job)
    assert slurm.wait_for_end(job)[0] == "CANCELLED"


def test_cores_and_memory_are_those_asked_for(slurm: Cluster, workspace: Path, tmp_path: Path) -> None:
    """By the allocation, and by the step's own environment, which since Slurm 22.05 does not inherit the cores."""
    rank = tmp_path / "python"
    rank.write_text(f"#!/bin/bash\nenv > {tmp_path}/environment-$RANK\n")
    rank.chmod(0o755)
    options = ["--python", str(rank), "--cpus-per-task", "2", "--sbatch-option", "mem=1500M"]
    [job] = slurm.submit(write_config(workspace, tmp_path), *options, ranks=1)
    assert slurm.wait_for_end(job) == ("COMPLETED", 0), log(tmp_path / "runs/run", job)
    shown = slurm.show(job)
    assert (shown["NumCPUs"], shown["CPUs/Task"], shown["MinMemoryNode"]) == ("2", "2", "1500M")
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "environment-0").read_text().splitlines() if "=" in line
    )
    names = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "OMP_NUM_THREADS", "SLURM_MEM_PER_NODE", "SLURM_DISTRIBUTION")
    assert [environment[name] for name in names] == ["2", "2", "2", "1500", "block"]


def test_a_job_that_gains_nothing_is_requeued_once(slurm: Cluster, workspace: Path, tmp_path: Path) -> None:
    idle = tmp_path / "python"
    idle.write_text("#!/bin/bash\nexit 75\n")
    idle.chmod(0o755)
    [job] = slurm.submit(write_config(workspace, tmp_path), "--python", str(idle))
    slurm.start_requeued(job)
    assert slurm.wait_for_end(job) == ("FAILED", 4), log(tmp_path / "runs/run", job)


def test_what_time_may_mend_is_requeued_after_a_pause(
    slurm: Cluster, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = tmp_path / "python"
    once.write_text(f"#!/bin/bash\nif mkdir {tmp_path}/begun; then exit 69; fi\nexit 0\n")
    once.chmod(0o755)
    monkeypatch.setitem(slurm.environment, "DDK_REQUEUE_PAUSE_S", "3000")
    # Slurm ends all of a job's processes as soon as it has heard: a slow command is still there then.
    slow = tmp_path / "bin/scontrol"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/bash\n{shutil.which("scontrol")} "$@" || exit\nsleep 2\n')
    slow.chmod(0o755)
    monkeypatch.setitem(slurm.environment, "PATH", f"{slow.parent}:{slurm.environment['PATH']}")
    [job] = slurm.submit(write_config(workspace, tmp_path), "--python", str(once), ranks=1)

    def paused() -> bool:
        shown = slurm.show(job)
        if shown["StartTime"] == "Unknown":  # it waits for the node
            return False
        begin, now = (
            datetime.fromisoformat(text) for text in (shown["StartTime"], slurm.run("date", "+%FT%T").strip())
        )
        return shown["JobState"] == "PENDING" and shown["Restarts"] == "1" and (begin - now).total_seconds() > 2800

    slurm.wait_for("a pause of 3,000 s", paused, timeout_s=60)
    slurm.start_requeued(job)
    assert slurm.wait_for_end(job) == ("COMPLETED", 0), log(tmp_path / "runs/run", job)
