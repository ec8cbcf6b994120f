"""Generated code, run in a process of its own that is shut in: no network, no writes, bounded time, memory, processes.

What holds depends on what the machine permits; `check_sandbox` says it. It is a fence against code that a language
model wrote by mistake, not against one that attacks the kernel: for that take a virtual machine.

The programs of HumanEval and MBPP: what is run to see whether an answer is right, and pass@1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddk_ds.errors import ConfigError
from ddk_ds.evaluation.jail import SETUP_FAILED
from ddk_ds.evaluation.results import Score, mean_and_stderr
from ddk_ds.evaluation.suites import Benchmark

_JAIL = Path(__file__).with_name("jail.py")
_GRACE_S = 10.0
"""How long the supervising process may take beyond its own limit before it is killed itself."""


@dataclass(frozen=True)
class Limits:
    """Of one program and what it starts."""

    cpu_s: int = 10
    """Of each of its processes."""
    wall_s: float = 20.0
    memory_bytes: int = 1 << 30
    """Address space of each of its processes."""
    file_bytes: int = 16 << 20
    """The largest file."""
    disk_bytes: int = 64 << 20
    """All files, where the working directory lies in memory."""
    processes: int = 32


@dataclass(frozen=True)
class Walls:
    """What shuts programs in on this machine."""

    network: bool
    """Whether it has no network at all, and sees no process but its own."""
    files: str
    """What keeps files from it: `mounts` (all else is read-only), or `landlock` (no writes elsewhere)."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """It came to its end: no exception, no early exit, no limit."""
    reason: str
    """The last line that it wrote to standard error, or which limit it met; empty where it passed."""
    walls: Walls


def run_program(source: str, limits: Limits = Limits(), *, namespaces: bool = True) -> Outcome:
    """Run a Python program with the standard library alone; nothing that it started outlives the call.

    Without `namespaces` it is run as where the machine permits none: by Landlock, and with a network.

    Raises ConfigError where this machine permits no walls.
    """
    read_end, write_end = os.pipe()
    with tempfile.TemporaryDirectory(prefix="ddk-program-") as directory, tempfile.TemporaryFile() as errors:
        options = {**asdict(limits), "directory": directory, "status": write_end, "namespaces": namespaces}
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(_JAIL), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=(write_end,),
                cwd=directory,
                env={},
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        with open(read_end, encoding="utf-8", errors="replace") as status:
            try:
                process.communicate(source.encode(errors="replace"), timeout=limits.wall_s + _GRACE_S)
            except BaseException:
                os.killpg(process.pid, 9)
                process.wait()
                raise
            lines = status.read().splitlines()
        errors.seek(0)
        last = (errors.read(limits.file_bytes).decode(errors="replace").strip().splitlines() or [""])[-1]
    if process.returncode == SETUP_FAILED or not lines:
        raise ConfigError(
            f"--allow-code-execution: this machine permits no walls around the code ({last or 'no reason given'}); "
            "allow user namespaces, or use Linux 5.13 or later with Landlock"
        )
    # Whoever can end the supervisor has not come to a proper end.
    passed = process.returncode == 0 and "passed" in lines[1:]
    reason = "" if passed else "timed out" if "timed out" in lines[1:] else last or "ended early"
    return Outcome(passed, reason, Walls(**json.loads(lines[0])))


def run_programs(sources: Sequence[str], limits: Limits = Limits()) -> list[Outcome]:
    """Run programs, as many at a time as there are cores. Raises as `run_program`."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda source: run_program(source, limits), sources))


def check_sandbox() -> Walls:
    """What would shut programs in here. Raises ConfigError where nothing would, or where no program runs inside."""
    outcome = run_program("import collections, math, re")
    if not outcome.passed:
        raise ConfigError(
            f"--allow-code-execution: {sys.executable} does not run shut in: {outcome.reason}; "
            "its directory must be readable by every user"
        )
    return outcome.walls


Document = Mapping[str, Any]


def humaneval_program(document: Document, answer: str) -> str:
    """The prompt's function completed by the answer, and the call of its test."""
    return f"{document['prompt']}{answer}\n\n{document['test']}\n\ncheck({document['entry_point']})\n"


def mbpp_program(document: Document, answer: str) -> str:
    """The answer, and the assertions on it."""
    return "\n".join((answer, document["test_setup_code"], *document["test_list"], ""))


_PROGRAMS: Mapping[str, Callable[[Document, str], str]] = {"humaneval": humaneval_program, "mbpp": mbpp_program}


def score_programs(benchmark: Benchmark, shots: int, answers: Sequence[tuple[Document, str]]) -> Score:
    """pass@1 with one answer to each document: the share of programs that come to their end in the sandbox."""
    make = _PROGRAMS[benchmark.name]
    outcomes = run_programs([make(document, answer) for document, answer in answers])
    value, stderr = mean_and_stderr([float(outcome.passed) for outcome in outcomes])
    timed_out = sum(outcome.reason == "timed out" for outcome in outcomes) / len(outcomes)
    return Score(
        benchmark.name, benchmark.title, benchmark.metric, shots, value, stderr, len(outcomes), {"timed_out": timed_out}
    )
