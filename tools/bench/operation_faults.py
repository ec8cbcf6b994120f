"""Kills and full disks at the file operations of a run: each start's operations are counted in an undisturbed one."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise

import numpy as np

from tools.bench.fault_cases import TRACEBACK, Case, Setting, note_command, refusal
from tools.bench.faults import small_disk
from tools.bench.file_operations import FILL, KILL_ALL, KILL_RANK, Operation, Strike, fill
from tools.bench.forked import ForkedJob, run_commands

KILLED = "killed at a file operation"
FULL = "disk full at a writer"
# Numbers of ranks: of a first start, or of the start before and the one that resumes and is killed.
STARTS = ((2,), (1, 1), (1,), (2, 2), (2, 1), (1, 2), (3,))
_AFTER = (1, 2, 3)
_WRITING_COMMANDS = (
    ("report", "{run}", "--out", "{out}/report"),
    ("export", "{run}", "--out", "{out}/exported"),
    ("replay", "{run}", "--json", "{out}/replay.json", "--picture", "{out}/replay.png"),
    ("summary", "{run}"),
    ("status", "{run}"),
)


def spread(operations: Sequence[Operation], count: int, rng: np.random.Generator) -> list[Operation]:
    """Return `count` operations, one from each of `count` equal parts of the list."""
    borders = np.linspace(0, len(operations), count + 1)
    return [operations[int(rng.uniform(low, high))] for low, high in pairwise(borders)]


def kills(setting: Setting, count: int, rng: np.random.Generator) -> Iterator[Case]:
    """Kill `count` runs, each at another file operation, and yield what came of their next starts."""
    shares = [len(part) for part in np.array_split(range(count), len(STARTS))]
    number = 0
    for starts, share in zip(STARTS, shares, strict=True):
        if share == 0:
            continue
        for operation in spread(setting.operations(*starts), share, rng):
            action = KILL_RANK if rng.integers(4) == 0 else KILL_ALL
            after = starts[-1] if rng.integers(2) else int(rng.choice(_AFTER))
            yield _strike(setting, f"kill-{number:03d}", (*starts, after), operation, action)
            number += 1


def writers(operations: Sequence[Operation]) -> list[Operation]:
    """Return the first operation on each file, the names of processes and steps aside."""
    first: dict[str, Operation] = {}
    for operation in operations:
        path = re.sub(r"\d{3,}", "#", operation.path)
        if operation.name in ("open", "mkdir", "rename") and not path.endswith(".lock"):
            first.setdefault(f"{operation.name} {path}", operation)
    return list(first.values())


def full_disks(setting: Setting, count: int, rng: np.random.Generator) -> Iterator[Case]:
    """Fill the disk at `count` of a run's writers, make room and start the run again; then at each command."""
    found = writers(setting.operations(2))
    for number, operation in enumerate(spread(found, count, rng) if count < len(found) else found):
        yield _strike(setting, f"full-{number:03d}", (2, 2), operation, FILL)
    if count:
        yield from _commands_on_a_full_disk(setting)


def _commands_on_a_full_disk(setting: Setting) -> Iterator[Case]:
    """Start each command that writes with its output on a full disk."""
    with small_disk(setting.folder / "full-commands") as disk:
        fill(str(disk))
        values = {"run": str(setting.reference(2)), "out": str(disk)}
        commands = [[word.format(**values) for word in command] for command in _WRITING_COMMANDS]
        for command, said in zip(commands, run_commands(commands, setting.folder / "full-said"), strict=True):
            case = Case(FULL, f"ddk {command[0]}", (), [said.code])
            note_command(case, said)
            yield case


def _strike(setting: Setting, name: str, ranks: tuple[int, ...], operation: Operation, action: str) -> Case:
    """Strike at one operation of the start before the last of `ranks`, and judge the last start."""
    *before, harmed, after = ranks
    with small_disk(setting.folder / f"{name}-disk") if action == FILL else nullcontext(None) as disk:
        runs = disk or setting.folder / name / "runs"
        config = setting.config(name, runs)
        if before:
            shutil.copytree(setting.interrupted(before[0]), runs)
        strike = Strike(action, operation.rank, operation.number)
        job = ForkedJob(config, runs / "run", harmed, strike)
        began = time.monotonic()
        code = job.run()
        case = Case(FULL if action == FILL else KILLED, "", ranks, [code], round(time.monotonic() - began, 2))
        case.fault = f"{action}, rank {operation.rank}, operation {operation.number}: " + struck(job, strike)
        if job.killed:
            case.broken.append("hang of the harmed start")
        if action == FILL and TRACEBACK in job.output():
            case.broken.append("traceback of the harmed start")
        elif action == FILL and not (code == 0 or (code == 2 and refusal(job.output()))):
            case.broken.append(f"the harmed start ended with {code}")
        (runs / "ballast").unlink(missing_ok=True)
        (config.parent / "harmed.txt").write_text(job.output())
        setting.start_again(case, config, runs / "run", after)
    if not case.broken:
        shutil.rmtree(config.parent)
    return case


def struck(job: ForkedJob, strike: Strike) -> str:
    """Return the operation at which the strike happened; "not reached" if the start ended before."""
    done = [step for step in job.operations() if step.rank == strike.rank]
    if len(done) < strike.number:
        return "not reached"
    return f"{done[strike.number - 1].name} {done[strike.number - 1].path}"
