"""tools/status.py shows the state of a run from its files alone."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from ddk_ds.commands.status_command import current_screen, main
from ddk_ds.report.run_progress import run_state
from ddk_ds.report.screen import Surroundings, screen
from ddk_ds.run_files import read_events, read_ledger, read_ledger_end
from ddk_ds.train.checkpoint.checkpoint_files import FORMAT
from tests.terminal import hear_signals
from tests.unit.report.made_run import make_run

ROOT = Path(__file__).parents[3]
GB = 10**9


def shown(run_dir: Path, width: int = 80, *, later_s: float = 0.0, max_domains: int | None = None) -> str:
    """The screen as text, as it is `later_s` from now."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    around = Surroundings(time.time() + later_s, (40, time.time() - 90, 3 * GB), [], 5 * GB)
    console.print(screen(run_dir, around, max_domains))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def watched(run_dir: Path, text: str, rank: int = 0) -> None:
    """Write the file that a rank's watchdog writes."""
    (run_dir / "stacks").mkdir(exist_ok=True)
    (run_dir / "stacks" / f"rank-{rank}.txt").write_text(text)


def test_ten_domains_fit_a_small_terminal(tmp_path: Path) -> None:
    events = [{"event": "alarm", "time_s": 1.79e9, "step": n, "text": "far behind " * 20} for n in (3, 4, 5)]
    domains = [f"a-domain-of-a-long-name-{number}" for number in range(10)]
    run_dir = make_run(tmp_path, steps=55, domains=domains, finished=False, events=events)
    watched(run_dir, "step after step 55, at most 1800 s\n")
    text = shown(run_dir)
    assert len(text.splitlines()) <= 23  # a line is left for the shell
    assert max(map(len, text.splitlines())) <= 80
    for part in ("running, in step after step 55", "step 55 of 55", "interval 5", "tokens/s", "checkpoint of step 40"):
        assert part in text
    assert "90 s old, 3.00 GB; disk free 5.0 GB" in text and "backward 30% gathers 21% teacher 15%" in text
    assert text.count("alarm at step") == 2 and "mean, at step 50" in text


def test_the_remaining_time_has_the_last_measurement_and_the_export(tmp_path: Path) -> None:
    saved = [{"event": "checkpoint", "time_s": 1.79e9, "step": 40, "path": "c", "pause_s": 0.1, "seconds": 3.0}]
    run_dir = make_run(tmp_path, steps=55, finished=False, events=saved)
    assert {record["clock"]["measure_s"] for record in read_ledger(run_dir) if record["kind"] == "interval"} == {4.0}
    assert "step 55 of 55" in shown(run_dir) and "ETA 10 s" in shown(run_dir)  # 4 s, 3 s and 3 s


def test_more_domains_than_lines(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, domains=[f"d{number}" for number in range(40)])
    text = shown(run_dir, max_domains=8)
    assert "and 33 more, all lower" in text and "d39" in text and "d0 " not in text


def test_states(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=55, finished=False)
    watched(run_dir, "evaluation after step 50, at most 7200 s\n")
    assert "silent for 10 min 00 s, in evaluation after step 50" in shown(run_dir, later_s=600)
    assert "running, in evaluation" in shown(run_dir, later_s=30)
    watched(run_dir, "checkpoint after step 50, at most 10 s\nTimeout (0:00:10)!\nThread 0x1\n", rank=3)
    assert "timed out, in checkpoint after step 50" in shown(run_dir, later_s=600)
    for event, reason in (("interrupted", {"signal": "SIGTERM"}), ("stopped", {"reason": "loss jumped"})):
        with (run_dir / "events.jsonl").open("a") as stream:
            stream.write(json.dumps({"event": event, "time_s": time.time(), "step": 55, **reason}) + "\n")
        assert f"{event} at step 55: {next(iter(reason.values()))}" in shown(run_dir)
    assert "finished: 60 steps done" in shown(make_run(tmp_path, name="other"))


def test_a_slow_run_is_not_called_silent(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=20, finished=False)
    records, events = read_ledger(run_dir), read_events(run_dir)
    assert run_state(run_dir, events, records, time.time() + 100).kind == "silent"
    records[-1]["clock"]["step_s"] = 30.0
    assert run_state(run_dir, events, records, time.time() + 100).kind == "running"


def test_the_end_of_a_ledger_is_that_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(tmp_path, steps=60, finished=False)
    monkeypatch.setattr("ddk_ds.run_files._BLOCK_BYTES", 100)  # lines lie over many blocks
    whole = read_ledger(run_dir)
    measurements = [record for record in whole if record["kind"] == "interval"]
    steps = [record for record in whole if record["kind"] == "step"]
    end = read_ledger_end(run_dir, steps=3, measurements=2)
    assert end == [measurements[-2], measurements[-1], *steps[-3:]]
    assert read_ledger_end(run_dir, steps=1000, measurements=1000) == whole
    with (run_dir / "ledger.jsonl").open("a") as stream:
        stream.write('{"kind": "step", "st')
    assert read_ledger_end(run_dir, steps=3, measurements=2) == end


def test_a_large_ledger_is_not_read_as_a_whole(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=60, finished=False)
    lines = (run_dir / "ledger.jsonl").read_text().splitlines(keepends=True)
    with (run_dir / "ledger.jsonl").open("w") as stream:
        stream.write("damaged, and never looked at\n" + lines[1] * 100_000)
        stream.writelines(lines[-30:])
    started = time.perf_counter()
    assert "step 60 of 60" in shown(run_dir)
    assert time.perf_counter() - started < 10


def test_one_clear_line_where_there_is_nothing_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path, steps=20, finished=False)
    cases = [(tmp_path / "none", "there is no such directory")]
    for name in ("empty", "measuring", "damaged", "strange"):
        (tmp_path / name).mkdir()
    cases.append((tmp_path / "empty", "not begun"))
    for name in ("measuring", "damaged", "strange"):
        (tmp_path / name / "events.jsonl").write_bytes((run_dir / "events.jsonl").read_bytes())
    watched(tmp_path / "measuring", "evaluation after step 0, at most 7200 s\n")
    cases.append(
        (tmp_path / "measuring", "nothing is measured yet in ledger.jsonl: running, in evaluation after step 0")
    )
    (tmp_path / "damaged" / "ledger.jsonl").write_text('{"kind": "step", "step\n')
    cases.append((tmp_path / "damaged", "damaged (no JSON), it begins"))
    (tmp_path / "strange" / "ledger.jsonl").write_text('{"kind": "step", "step": 4}\n')
    cases.append((tmp_path / "strange", "near its end: damaged (step.interval: field required)"))
    for path, message in cases:
        assert main([str(path)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_the_newest_complete_checkpoint_is_shown(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=20, finished=False)
    for step in (8, 16):
        directory = run_dir / "checkpoints" / f"step-{step:08d}"
        directory.mkdir(parents=True)
        (directory / "a.pt").write_bytes(b"12345")
        manifest = {"format": FORMAT, "step": step, "world_size": 1, "ledger_bytes": 0, "run": {}, "versions": {}}
        (directory / "manifest.json").write_text(json.dumps({**manifest, "files": {"a.pt": [5, "x"]}}))
        os.utime(directory / "manifest.json", (time.time() - 300, time.time() - 300))
    console = Console(file=io.StringIO(), width=80)
    console.print(current_screen(run_dir, console))
    assert isinstance(console.file, io.StringIO)
    assert "checkpoint of step 16, 5 min 00 s old" in console.file.getvalue()
    (run_dir / "checkpoints" / "step-00000016" / "a.pt").write_bytes(b"1")  # cut: it is none
    console.print(current_screen(run_dir, console))
    assert "checkpoint of step 8" in console.file.getvalue()


def test_watching_waits_for_the_run_and_ends_by_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, "tools/status.py", str(tmp_path / "late"), "--watch", "0.2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=hear_signals)
    try:
        time.sleep(2)
        make_run(tmp_path, name="late", steps=20)
        time.sleep(2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "finished: 20 steps done" in output
