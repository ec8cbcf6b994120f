"""An error of one rank ends both, with one code and one line: ledger, rewind, summary, and a signal."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.direct_ranks import Ranks
from tools.bench.small_run import write_config


def end_of(config: Path, folder: Path, expected: str) -> None:
    """Start the run; assert that both ranks end with 2, and that one of them says so in one line."""
    ranks = Ranks(config, folder)
    codes = ranks.wait(240)
    check(ranks, codes, expected)


def check(ranks: Ranks, codes: list[int | None], expected: str) -> None:
    assert codes == [2, 2], ranks.text
    lines = [line for line in ranks.text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and expected in lines[0] and "Traceback" not in ranks.text, ranks.text


@pytest.mark.long("one start; tests/dist/test_leaving.py has the way out")
def test_a_ledger_that_rank_0_cannot_write(workspace: Path, tmp_path: Path) -> None:
    options = {"stop": {"steps": 100_000}, "mixture": {"interval_steps": 100_000}}
    config = write_config(workspace, tmp_path, checkpoint={"every_steps": 100_000}, **options)
    ledger = tmp_path / "runs/run/ledger.jsonl"
    ranks = Ranks(config, tmp_path)
    wait_for_step(ranks, ledger, 3)
    # A directory in its place: the tests may run as root, who can write any file.
    ledger.rename(ledger.with_name("ledger.kept"))
    ledger.mkdir()
    check(ranks, ranks.wait(120), "ledger.jsonl was deleted or changed")


@pytest.mark.long("three starts; tests/dist/test_leaving.py has the way out")
def test_a_rewind_and_a_summary_that_rank_0_cannot_write(workspace: Path, tmp_path: Path) -> None:
    config = write_config(workspace, tmp_path, checkpoint={"every_steps": 100_000}, stop={"steps": 4})
    run_dir = tmp_path / "runs/run"
    ranks = Ranks(config, tmp_path)
    wait_for_step(ranks, run_dir / "ledger.jsonl", 2)
    for process in ranks.processes:
        process.kill()
    ranks.wait(60)
    (run_dir / "ledger.discarded.jsonl").mkdir()
    end_of(config, tmp_path, "ledger.")
    (run_dir / "ledger.discarded.jsonl").rmdir()
    (run_dir / "summary.json").mkdir()
    end_of(config, tmp_path, "summary.json")


@pytest.mark.long("one start; tests/dist/test_leaving.py has the way out")
def test_a_signal_that_ends_one_rank_at_once(workspace: Path, tmp_path: Path) -> None:
    """A first Ctrl-C before the training: the other rank would wait for this one."""
    config = write_config(workspace, tmp_path)
    ranks = Ranks(config, tmp_path, {"SLOW_FILE": "shards/domains.json", "SLOW_S": "10000"})
    wait_until(ranks, lambda: "waits for the disk" in ranks.outputs[1].read_text())
    second = ranks.processes[1].pid
    assert second is not None
    os.kill(second, signal.SIGINT)
    assert ranks.wait(60) == [130, 130], ranks.text


def wait_for_step(ranks: Ranks, ledger: Path, step: int) -> None:
    """Wait until the ledger has that step."""
    wait_until(ranks, lambda: f'"step": {step},' in (ledger.read_text() if ledger.is_file() else ""))


def wait_until(ranks: Ranks, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert ranks.processes[0].exitcode is None and time.monotonic() < end, ranks.text
        time.sleep(0.02)
