"""A fault campaign's undisturbed runs, and the comparison of a run that was harmed with them."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ddk_ds.files import size_and_xxh64
from tools.bench.faults import intact_checkpoints
from tools.bench.file_operations import KILL_ALL, Operation, Strike
from tools.bench.forked import ForkedJob, Said
from tools.bench.small_run import make_workspace, without_clock, write_config

ROUNDING = 1e-5
# Each with the least size that its differences are divided by; samples that are owed can be none.
_ROUNDED = dict.fromkeys(("loss", "ce", "kl", "grad_norm", "student_ppl", "smoothed_ppl", "ratio"), 1e-12)
_ROUNDED |= {"proportions": 1e-12, "log_proportions": 1e-12, "owed": 1.0}
# Two and a half intervals, and a checkpoint every second step. The rounding noise of near-zero gradients differs
# between numbers of ranks; with AdamW's usual epsilon it would become steps as large as the learning rate.
OPTIONS: dict[str, Any] = {
    "mixture": {"interval_steps": 4},
    "stop": {"steps": 10},
    "checkpoint": {"every_steps": 2, "keep_last": 3},
    "optimizer": {"eps": 1e-5},
    "train": {"global_batch_samples": 12, "micro_batch_samples": 2},
}
# Shorter: two and a third intervals, and a process that reads.
SHORT = OPTIONS | {
    "mixture": {"interval_steps": 3},
    "stop": {"steps": 7},
    "data": {"num_workers": 1, "validation_samples": 6},
}
RESULTS = ("resumed", "refused", "same", "said", "not to be known")
_INTERRUPTED_AT = "run/checkpoints/.partial-step-00000006"
TRACEBACK = "Traceback (most recent call last)"


@dataclass
class Case:
    """One fault of a new kind, and what came of it."""

    kind: str
    fault: str
    ranks: tuple[int, ...]
    """Number of ranks of each start."""
    exit_codes: list[int | None] = field(default_factory=list)
    """Of each start; None if it had to be killed, a signal's below 0."""
    seconds: float = 0.0
    """Seconds from the fault to the end of the last process, where that is measured."""
    result: str = ""
    """`resumed` to the undisturbed run's numbers, `refused` with one line, or `same` output of a command."""
    line: str = ""
    """Last line of a refusal."""
    largest_difference: float = 0.0
    """Largest relative difference from the undisturbed run's numbers."""
    broken: list[str] = field(default_factory=list)
    """Promises that were broken."""


class Setting:
    """Data, models and undisturbed runs that the cases of a campaign share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._operations: dict[tuple[int, ...], list[Operation]] = {}

    @cached_property
    def workspace(self) -> Path:
        """Return the directory with data and models; make it if it is missing."""
        workspace = self.folder / "workspace"
        return workspace if (workspace / "student/model.safetensors").exists() else make_workspace(workspace)

    def config(self, name: str, output_dir: Path | None = None) -> Path:
        """Write the configuration of case `name`, whose run is `<output_dir>/run`, and return its path."""
        folder = self.folder / name
        return write_config(self.workspace, folder, name="run", output_dir=str(output_dir or folder / "runs"), **SHORT)

    def reference(self, ranks: int) -> Path:
        """Return the directory of the undisturbed run on so many ranks; make it if it is missing."""
        self.operations(ranks)
        return self.folder / f"undisturbed-{ranks}/runs/run"

    def interrupted(self, ranks: int) -> Path:
        """Return the parent of the directory of a run that was killed while it wrote its third checkpoint."""
        runs = self.folder / f"interrupted-{ranks}/runs"
        if not runs.exists():
            at = next(step for step in self.operations(ranks) if step.path == _INTERRUPTED_AT)
            config = self.config(f"interrupted-{ranks}")
            code = ForkedJob(config, runs / "run", ranks, Strike(KILL_ALL, at.rank, at.number)).run()
            assert code == -9, f"the run to interrupt ended with {code}"
        return runs

    def operations(self, *starts: int) -> list[Operation]:
        """Return the file operations of an undisturbed start on starts[-1] ranks.

        It is a run's first, or the one after the interruption of a run on starts[0] ranks.
        """
        if starts not in self._operations:
            name = f"undisturbed-{'-'.join(map(str, starts))}"
            config = self.config(name)
            runs = self.folder / name / "runs"
            if len(starts) > 1:
                shutil.copytree(self.interrupted(starts[0]), runs)
            job = ForkedJob(config, runs / "run", starts[-1])
            if not (runs / "run/summary.json").exists():
                code = job.run()
                assert code == 0, f"{name} ended with {code}\n{job.output()[-6000:]}"
            self._operations[starts] = job.operations()
        return self._operations[starts]

    def start_again(self, case: Case, config: Path, run_dir: Path, ranks: int) -> None:
        """Start a harmed run once more, and note in `case` if it resumed from an intact checkpoint, and how."""
        intact, started = intact_checkpoints(run_dir), time.time()
        again = ForkedJob(config, run_dir, ranks)
        case.exit_codes.append(again.run())
        source = resumed_from(run_dir, started)
        if source is not None and source not in intact:
            case.broken.append("partial checkpoint loaded")
        self.judge(case, run_dir, again.output())
        if case.result == "refused":
            case.broken.append("refused")

    def judge(self, case: Case, run_dir: Path, output: str) -> None:
        """Compare a run after its last start with the undisturbed one, and note the result in `case`."""
        code = case.exit_codes[-1]
        if TRACEBACK in output:
            case.broken.append("traceback")
        if code is None:
            case.broken.append("hang")
        elif code == 0:
            self._compare(case, run_dir)
        elif (line := refusal(output)) and code == 2:
            case.result, case.line = "refused", line
        else:
            case.broken.append(f"ended with {code}")

    def _compare(self, case: Case, run_dir: Path) -> None:
        same_ranks = len(set(case.ranks)) == 1
        reference = self.reference(case.ranks[0] if same_ranks else 2)
        case.largest_difference, same = compare(run_dir, reference)
        if not same or not case.largest_difference <= (0.0 if same_ranks else ROUNDING):
            case.broken.append("wrong numbers")
        if left := differing_files(run_dir, reference, same_weights=same_ranks):
            case.broken.append(f"files: {', '.join(left)}")
        if not case.broken:
            case.result = "resumed"


def note_command(case: Case, said: Said) -> None:
    """Note in `case` what came of a command whose output need not be compared."""
    if TRACEBACK in said.text:
        case.broken.append("traceback")
    elif said.code is None:
        case.broken.append("hang")
    elif said.code == 0:
        case.result = "same"
    elif said.code == 2 and (line := refusal(said.text)):
        case.result, case.line = "refused", line
    else:
        case.broken.append(f"ended with {said.code}")


def refusal(output: str) -> str:
    """Return the line of an error that a user can mend; "" if there is none."""
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    return lines[-1] if lines else ""


def differing_files(run_dir: Path, reference: Path, *, same_weights: bool) -> list[str]:
    """Return the files of a finished run's export and summary that are missing, too many or other than expected."""
    differing = []
    ours, theirs = ({path.name: path for path in (place / "export").glob("*")} for place in (run_dir, reference))
    for name in sorted(ours.keys() | theirs.keys()):
        exact = same_weights or name not in ("model.safetensors", "README.md")
        present = name in ours and name in theirs
        if not present or (exact and size_and_xxh64(ours[name]) != size_and_xxh64(theirs[name])):
            differing.append(f"export/{name}")
    summaries = [json.loads((place / "summary.json").read_text()) for place in (run_dir, reference)]
    keys = ("steps", "tokens", "reason")
    return differing + ["summary.json"] * (len({str([summary[key] for key in keys]) for summary in summaries}) > 1)


def resumed_from(run_dir: Path, since: float) -> Path | None:
    """Return the checkpoint from which a start after `since` resumed.

    It is None if the run began anew, or if nothing was left to do.
    """
    path = run_dir / "events.jsonl"
    found = None
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # a full disk leaves half a line
            event = json.loads(line)
            if event["event"] == "resume" and event["time_s"] >= since:
                found = Path(event["path"])
    return found


def compare(run_dir: Path, reference: Path) -> tuple[float, bool]:
    """Return the largest relative difference of the rounded numbers, and True if all else in the ledgers is equal."""
    ours, theirs = without_clock(run_dir), without_clock(reference)
    if len(ours) != len(theirs):
        return float("nan"), False
    worst, same = 0.0, True
    for line, expected in zip(ours, theirs, strict=True):
        for key in line.keys() | expected.keys():
            left, right = line.get(key), expected.get(key)
            if key in _ROUNDED and left is not None and right is not None:
                a, b = (np.array([*x.values()] if isinstance(x, dict) else x, np.float64) for x in (left, right))
                worst = max(worst, float(np.max(np.abs(a - b) / np.maximum(np.abs(b), _ROUNDED[key]))))
            else:
                same = same and left == right
    return worst, same
