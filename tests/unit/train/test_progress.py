"""The terminal's line at several widths, the remaining time, and output that nobody reads any more."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from ddk_ds.config import Mixture
from ddk_ds.config.run_config import interval_ends
from ddk_ds.remaining_time import RemainingTime
from ddk_ds.train.progress import RunProgress, clock_time, fitted
from tests.terminal import Terminal

# A run whose steps, measurement and export take a known time; the widths are those of a person's window.
SHOW = """
import time
from types import SimpleNamespace
from ddk_ds.train.progress import RunProgress
names = ["python", "mathematics"]
progress = RunProgress(0, 12000, [1000 * i for i in range(1, 13)], names)
metrics = SimpleNamespace(loss=2.5, ce=2.25, kl=1.25)
with progress.part("measuring the teacher", 2) as advance:
    advance()
    time.sleep(0.3)
progress.start(0)
progress.interval(0, [0.75, 0.25])
for step in range(1, 4):
    progress.step(step, metrics, 123456.0, 2.0)
    time.sleep(0.15)
with progress.part("measuring the student", 4, measured_after=3) as advance:
    for _ in range(4):
        time.sleep(0.15)
        advance()
progress.say("a line [between] that is kept")
with progress.part("exporting the student", 2) as advance:
    advance()
    time.sleep(0.3)
progress.stop()
"""


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_step_and_remaining_time_come_first_at_any_width(columns: int, tmp_path: Path) -> None:
    terminal = Terminal([sys.executable, "-c", SHOW], columns=columns, env={**os.environ, "TERM": "xterm-256color"})
    try:
        assert terminal.code() == 0, terminal.text
    finally:
        terminal.close()
    lines = terminal.lines
    assert all(len(line) <= columns for line in lines), max(lines, key=len)
    steps = [line for line in lines if line.startswith("step 3/12,000")]
    # 11,997 steps of 2 s, and the twelve measurements to come, which take no time that is known.
    assert any(re.match(r"step 3/12,000  ETA 6:39:54  loss 2\.5000", line) for line in steps), lines
    assert any("123,456 tokens/s" in line for line in steps) is (columns >= 80)
    assert any("CE 2.2500  KL 1.2500" in line for line in steps) is (columns == 120)
    assert all("━" in line for line in steps)
    for part in ("measuring the teacher  1/2", "measuring the student  2/4", "exporting the student  1/2"):
        assert any(line.startswith(part) and "━" in line for line in lines), (part, lines)
    assert "a line [between] that is kept" in lines and "interval 0: python 75.0%  mathematics 25.0%" in lines


def test_work_that_is_no_run_has_its_own_remaining_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ddk teach`: 4 of 1,200 passes in 12 s leave an hour all but 12 s."""
    now = [100.0]
    monkeypatch.setattr("ddk_ds.train.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    with RunProgress(0, 0, [], []).part("passes of the teacher", 1200) as advance:
        for _ in range(4):
            now[0] += 3.0
            advance()
    assert capsys.readouterr().out == "passes of the teacher  4/1,200  ETA 0:59:48\n"


def test_as_many_pieces_as_fit() -> None:
    assert fitted(["step 1/2", "ETA 0:00:01", "loss 1"], 29) == "step 1/2  ETA 0:00:01  loss 1"
    assert fitted(["step 1/2", "ETA 0:00:01", "loss 1"], 28) == "step 1/2  ETA 0:00:01"
    assert fitted(["step 1/2", "ETA 0:00:01"], 3) == "step 1/2"
    assert clock_time(3723.4) == "1:02:03" and clock_time(None) == "-:--:--"


def after(steps: int, *, measured: Sequence[int] = ()) -> RemainingTime:
    """Return the estimate of a run of 10 steps of 2 s that measures after 4, 8 and 10, for 5 s each."""
    remaining = RemainingTime(10, [4, 8, 10])
    for _ in range(steps):
        remaining.step_took(2.0)
    for step in measured:
        remaining.measurement_took(5.0, step)
    return remaining


def test_the_remaining_time_has_measurements_and_export() -> None:
    assert after(0).seconds(0) is None
    assert after(0).seconds(0, (0.0, 1.0)) is None
    assert after(3, measured=[0]).seconds(3) == 7 * 2 + 3 * 5
    assert after(4, measured=[0]).seconds(4) == 6 * 2 + 3 * 5  # the measurement after step 4 is still to come,
    assert after(4, measured=[0]).seconds(4, (0.4, 2.0)) == 6 * 2 + 0.6 * 5 + 2 * 5  # under way,
    assert after(4, measured=[0, 4]).seconds(4) == 6 * 2 + 2 * 5  # and done
    last = after(10, measured=[0, 4, 8])
    assert last.seconds(10, (0.2, 1.0)) == 0.8 * 5
    last.checkpoint_took(30.0)
    assert last.seconds(10, (0.2, 1.0)) == 0.8 * 5 + 30 + 30
    first = after(1)
    assert first.seconds(4, (0.25, 3.0)) == 6 * 2 + 9 + 2 * 12  # 12 s, as the present one goes


def test_a_run_measures_at_the_end_of_each_interval() -> None:
    assert interval_ends(Mixture(interval_steps=4), 10) == [4, 8, 10]
    assert interval_ends(Mixture(interval_steps=4), 8) == [4, 8]
    assert interval_ends(Mixture(interval_steps=2, interval_growth=2.0), 20) == [2, 6, 14, 20]
    assert interval_ends(Mixture(interval_steps=100), 10) == [10]


SAY = """
import sys, time
from ddk_ds.train.progress import RunProgress
progress = RunProgress(0, 10, [10], ["a"])
progress.start(0)
for number in range(200):
    progress.say(f"line {number}")
    time.sleep(0.005)
print("to the end", file=sys.stderr)
"""


def test_a_run_goes_on_when_nobody_reads_its_output() -> None:
    """`deepspeed ... | tee log`: Ctrl-C ends tee, and the run must still save."""
    process = subprocess.Popen([sys.executable, "-c", SAY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.stderr is not None and process.stderr.read() == "to the end\n"
    assert process.wait() == 0
