"""The fault campaign counts, damages and judges rightly: known files, operations and outcomes made here."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from ddk_ds.files import size_and_xxh64
from tools.bench.damaged_files import DAMAGES, damages
from tools.bench.fault_campaign import Outcome, case_table, summary
from tools.bench.fault_cases import Case, compare, note_command, refusal, resumed_from
from tools.bench.faults import KINDS, MOMENTS, intact_checkpoints
from tools.bench.file_operations import KILL_RANK, Operation, Strike, look_at, read_operations
from tools.bench.forked import Said
from tools.bench.operation_faults import spread, writers


def write_ledger(run_dir: Path, *losses: float, tokens: int = 7) -> Path:
    """Write a ledger with these losses, and return the run's directory."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = [{"kind": "step", "loss": loss, "domain_tokens": [tokens], "clock": {"step_s": loss}} for loss in losses]
    (run_dir / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def test_ledgers_are_compared_to_the_last_digit(tmp_path: Path) -> None:
    reference = write_ledger(tmp_path / "a", 2.0, 1.0)
    assert compare(write_ledger(tmp_path / "b", 2.0, 1.0), reference) == (0.0, True)
    assert compare(write_ledger(tmp_path / "c", 2.0, 1.00001), reference) == (pytest.approx(1e-5), True)
    assert compare(write_ledger(tmp_path / "d", 2.0, 1.0, tokens=8), reference) == (0.0, False)
    assert not compare(write_ledger(tmp_path / "e", 2.0), reference)[1]


def test_what_follows_from_rounded_numbers_is_compared_as_they_are(tmp_path: Path) -> None:
    for name, owed, log_share in (("a", 0.001, -1.0), ("b", 0.00100001, -1.00001)):
        (tmp_path / name).mkdir()
        line = {"kind": "interval", "owed": {"x": owed}, "log_proportions": {"x": log_share}, "counts": {"x": 3}}
        (tmp_path / name / "ledger.jsonl").write_text(json.dumps(line) + "\n")
    assert compare(tmp_path / "b", tmp_path / "a") == (pytest.approx(1e-5), True)


def test_a_checkpoint_is_whole_by_its_hashes(tmp_path: Path) -> None:
    for step, content in ((1, b"whole"), (2, b"harmed")):
        directory = tmp_path / f"checkpoints/step-{step}"
        directory.mkdir(parents=True)
        (directory / "shard").write_bytes(content)
        files = {"shard": size_and_xxh64(directory / "shard")}
        (directory / "manifest.json").write_text(json.dumps({"files": files}))
    (directory / "shard").write_bytes(b"harmes")
    (tmp_path / "checkpoints/step-3").mkdir()
    assert [path.name for path in intact_checkpoints(tmp_path)] == ["step-1"]


def test_only_the_last_start_counts(tmp_path: Path) -> None:
    events = [{"event": "resume", "path": "step-2", "time_s": 10.0}, {"event": "end", "time_s": 11.0}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert resumed_from(tmp_path, since=9.0) == Path("step-2")
    assert resumed_from(tmp_path, since=10.5) is None
    assert resumed_from(tmp_path / "never begun", since=0.0) is None


def test_half_an_event_is_passed_over(tmp_path: Path) -> None:
    resumed = json.dumps({"event": "resume", "path": "step-2", "time_s": 10.0})
    (tmp_path / "events.jsonl").write_text(f'{{"event": "sta\n{resumed}\n{{"eve')
    assert resumed_from(tmp_path, since=9.0) == Path("step-2")


def write_files(folder: Path) -> None:
    """Make each kind of operation once, and some that are not looked at."""
    (folder / "made").mkdir()
    with (folder / "made/new").open("w") as stream:
        stream.write("1")
        stream.flush()
        os.fsync(stream.fileno())
    (folder / "made/new").rename(folder / "made/renamed")
    (folder / "made/renamed").read_text()
    (folder.parent / "elsewhere").write_text("")
    with (folder / "made/renamed").open("a") as stream:
        stream.write("2")
    shutil.rmtree(folder / "made")


OPERATIONS = ["mkdir made", "open made/new", "fsync made/new", "rename made/renamed", "open made/renamed"]
OPERATIONS += ["remove made/renamed", "rmdir made"]


def in_a_child(folder: Path, log: Path, strike: Strike | None) -> int:
    """Return the exit code of a process that is looked at while it writes; the hook cannot be taken away again."""
    process = os.fork()
    if process == 0:
        code = 1
        with contextlib.suppress(OSError):
            look_at(folder, 1, log, strike)
            write_files(folder)
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_operations_are_counted_as_they_happen(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert in_a_child(tmp_path / "run", tmp_path / "log", None) == 0
    found = read_operations(tmp_path / "log", rank=1)
    assert [f"{step.name} {step.path}" for step in found] == OPERATIONS
    assert [step.number for step in found] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("number", "left"), [(1, {}), (2, {}), (4, {"new": "1"}), (5, {"renamed": "1"}), (7, {})])
def test_a_kill_comes_before_its_operation(tmp_path: Path, number: int, left: dict[str, str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert in_a_child(run, tmp_path / "log", Strike(KILL_RANK, 1, number)) == -signal.SIGKILL
    assert {path.name: path.read_text() for path in run.glob("made/*")} == left
    assert (run / "made").exists() == (number > 1)


def test_another_ranks_strike_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert in_a_child(tmp_path / "run", tmp_path / "log", Strike(KILL_RANK, 0, 1)) == 0


def test_chosen_operations_lie_in_all_parts_of_a_run() -> None:
    operations = [Operation(0, number, "open", f"file-{number}") for number in range(1, 101)]
    chosen = spread(operations, 10, np.random.default_rng(1))
    assert [(step.number - 1) // 10 for step in chosen] == list(range(10))
    assert spread(operations[:3], 3, np.random.default_rng(1)) == operations[:3]


def test_each_file_has_one_writer() -> None:
    paths = ["run/.run.json.123.partial", "run/ledger.jsonl", "run/ledger.jsonl", "run/step-00000002/a"]
    paths += ["run/step-00000004/a", "run/.run.json.9876.partial", "run/.lock"]
    operations = [Operation(0, number, "open", path) for number, path in enumerate(paths, 1)]
    operations += [Operation(0, 8, "fsync", "run/other"), Operation(0, 9, "mkdir", "run/ledger.jsonl")]
    assert [step.number for step in writers(operations)] == [1, 2, 4, 9]


@pytest.mark.parametrize("content", [b"x", b"line one\nline two\n" * 40])
def test_every_damage_changes_a_file(content: bytes) -> None:
    rng = np.random.default_rng(3)
    harmed = {name: damage(content, rng) for name, damage in DAMAGES.items()}
    assert content not in harmed.values()
    assert harmed["empty"] == b"" and content.startswith(harmed["cut in half"])
    flipped = int.from_bytes(content, "big") ^ int.from_bytes(harmed["one bit flipped"], "big")
    assert flipped.bit_count() == 1
    assert len(harmed["garbage in the middle"]) == len(content)


def test_only_files_with_content_are_damaged(tmp_path: Path) -> None:
    for name, content in {"run/ledger.jsonl": "1", "run/.lock": "", "run/checkpoints/step-2/a": "1"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    files = {name for name, _ in damages(tmp_path)}
    assert files == {"run/ledger.jsonl", "run/checkpoints/step-2/a"}
    assert len(damages(tmp_path)) == len(files) * len(DAMAGES)


def test_a_refusal_is_one_line() -> None:
    assert refusal("a warning\nerror: make room\n") == "error: make room"
    assert refusal("[rank1]: error: make room") == ""
    assert refusal("RuntimeError: no") == ""


@pytest.mark.parametrize(
    ("said", "result", "broken"),
    [
        (Said(0, "fine"), "same", []),
        (Said(2, "error: no such run"), "refused", []),
        (Said(2, "no such run"), "", ["ended with 2"]),
        (Said(1, "Traceback (most recent call last):"), "", ["traceback"]),
        (Said(None, ""), "", ["hang"]),
    ],
)
def test_what_a_command_said(said: Said, result: str, broken: list[str]) -> None:
    case = Case("file damaged", "", ())
    note_command(case, said)
    assert (case.result, case.broken) == (result, broken)


def test_the_summary_counts_what_went_wrong() -> None:
    good = Outcome("rank killed", "training", "", (2, 2), 1, 2.0, True, 4, True, 0.0, False, False)
    bad = Outcome("all killed", "export", "", (2, 1), None, 60.0, False, 0, False, float("nan"), True, True)
    cases = [Case("file damaged", "", (2,), result="refused"), Case("file damaged", "", (2,), broken=["hang"])]
    counts = {key: value for key, value in summary([good, bad, good], cases).items() if key not in ("faults", "cases")}
    assert counts == {
        **{"runs": 3, "resumed": 2, "identical": 2, "hangs": 1, "partial_checkpoints_loaded": 1},
        **{"slowest_end_s": 60.0, "broken": 1},
    }
    assert [list(column.cells) for column in case_table(cases).columns] == [
        *(["file damaged"], ["2"], ["0"], ["1"], ["0"], ["0"], ["0"], ["1"]),
    ]
    assert set(KINDS) == set(MOMENTS)
