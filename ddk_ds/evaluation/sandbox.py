"""Run the programs that a model writes for HumanEval and MBPP inside bubblewrap, and score them by pass@1.

As in the benchmarks' own harness (human_eval/execution.py of openai/human-eval) a program is executed by exec() in a
module that is not `__main__`, and passes if it comes to its end. It has a control: the same program with a false
assertion at its end, which must not pass. So a program that leaves early passes neither by what it writes nor by what
it reads of the driver.

A program sees Python and the system's libraries read-only, an empty /tmp in memory, no network, no other process and
no environment; its time, memory, files and processes are bounded. This holds off the mistakes of a language model. It
is no defence against code that attacks the kernel: use a virtual machine for that.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from ddk_ds.errors import ConfigError
from ddk_ds.evaluation.results import Score, mean_and_stderr
from ddk_ds.evaluation.suites import Benchmark

UNSAFE_ADVICE = "in a container of your own, --unsafe-run-code runs the programs without a sandbox"

_DRIVER = """
import json, os, resource, sys, traceback, types
def run(end=os._exit, process=os.getpid, write=os.write):
    options, source = json.loads(sys.stdin.buffer.readline()), sys.stdin.buffer.read()
    if options["user_id"] is not None:
        os.setgroups([])
        os.setresgid(*[options["user_id"]] * 3)
        os.setresuid(*[options["user_id"]] * 3)
    for kind, value in options["limits"].items():
        resource.setrlimit(getattr(resource, kind), (value, value))
    status, verdict, own = options["status"], options["verdict"].encode(), process()
    write(status, b"started ")
    module = sys.modules["program"] = types.ModuleType("program")
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
    except BaseException as error:
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stderr.flush()
        end(1)  # at once: threads of the program may go on for ever
    if process() == own:
        write(status, verdict)
        end(0)
run()
"""
"""The Python program that limits itself and then executes a program. Its standard input is a line of JSON with its
options, among them the word that is the verdict of a program that passes, and then the program.
"""
_CONTROL = "\n\nassert False\n"
"""The end of a program's control: whoever still passes has not come to the end."""
_SYSTEM_PATHS = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
"""Paths that Python needs in addition to its own directory; those that a machine lacks are skipped."""
_FIRST_PRIVATE_ID = 2_000_000_000
"""Start of the range of user ids from which each program of root gets one."""
_STATUS_BYTES = 1 << 16
"""Bytes that fit into a pipe: what the driver or the program has written there."""
_ALL_IDS = ["0", "0", "4294967295"]
"""Content of /proc/self/uid_map outside of user namespaces."""


@dataclass(frozen=True)
class Limits:
    """Resources that one program and the processes that it starts can take."""

    cpu_s: int = 10
    """Processor time of each process, in seconds."""
    wall_s: float = 20.0
    """Time until the program and all its processes are killed, in seconds."""
    memory_bytes: int = 1 << 30
    """Address space of each process."""
    file_bytes: int = 16 << 20
    """Size of the largest file."""
    disk_bytes: int = 64 << 20
    """Size of all files in /tmp together, and of those in /dev/shm."""
    processes: int = 32
    """Number of processes at a time."""


@dataclass(frozen=True)
class Outcome:
    """The end of a program: success, or the reason of its failure."""

    passed: bool
    """True if it came to its end, without an exception, an early exit or a limit, and its control did not."""
    reason: str
    """The last line that it wrote to standard error, or the limit that it met; empty if it passed."""


def check_sandbox() -> str:
    """Run a trial program and return the name and version of the sandbox, as `bubblewrap 0.8.0`.

    Raises ConfigError if bubblewrap is missing or cannot start here, or if Python does not run inside it.
    """
    outcome = run_program("import collections, math, re")
    if not outcome.passed:
        raise ConfigError(
            f"--allow-code-execution: {sys.executable} does not run inside bubblewrap: {outcome.reason}; "
            f"use a Python that needs nothing outside of {sys.base_prefix} and /usr; {UNSAFE_ADVICE}"
        )
    return subprocess.run([_bwrap_path(), "--version"], capture_output=True, text=True, check=True).stdout.strip()


def run_programs(sources: Sequence[str], limits: Limits = Limits(), *, sandboxed: bool = True) -> list[Outcome]:
    """Run programs, as many at a time as there are cores. Raises ConfigError as `run_program` does."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(partial(run_program, limits=limits, sandboxed=sandboxed), sources))


def run_program(source: str, limits: Limits = Limits(), *, sandboxed: bool = True) -> Outcome:
    """Run a Python program that has only the standard library, and kill everything that it started.

    The outcome tells a failure or a time-out of the program. If `sandboxed` is False, the program runs as an ordinary
    process of this user, in an empty directory, with limited time, memory and file size; a process that it moves to
    another session survives.

    Raises ConfigError if bubblewrap is missing or cannot start on this machine.
    """
    outcome = _run(source, limits, sandboxed=sandboxed)
    if outcome.passed and _run(source + _CONTROL, limits, sandboxed=sandboxed).passed:
        return Outcome(False, "it passes with a false assertion at its end too")
    return outcome


def _run(source: str, limits: Limits, *, sandboxed: bool) -> Outcome:
    verdict = secrets.token_hex(16)
    reading, status = os.pipe()
    with (
        open(reading, "rb", buffering=0) as progress,
        tempfile.TemporaryFile() as info,
        tempfile.TemporaryFile() as errors,
        tempfile.TemporaryDirectory(prefix="ddk-program-", ignore_cleanup_errors=True) as directory,
    ):
        prefix = _bwrap(limits, info.fileno()) if sandboxed else []
        process = subprocess.Popen(
            [*prefix, os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", _DRIVER],
            stdin=subprocess.PIPE,  # not a file, which the program could read again
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(status, info.fileno()) if sandboxed else (status,),
            cwd=directory,
            env={},
            start_new_session=True,
        )
        os.close(status)
        options = json.dumps(_options(limits, status, verdict, sandboxed=sandboxed))
        try:
            process.communicate(f"{options}\n{source}".encode(errors="replace"), limits.wall_s)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_and_wait(process, info if sandboxed else None)
        os.set_blocking(reading, False)  # without a sandbox, a process that has left the session can hold the pipe
        said = progress.read(_STATUS_BYTES) or b""
        last = (_content(errors).strip().splitlines() or [""])[-1]
    if not said and code is not None:
        raise ConfigError(
            f"--allow-code-execution: bubblewrap cannot start on this machine ({last or 'no reason given'}): "
            f"allow user namespaces; {UNSAFE_ADVICE}"
        )
    passed = code == 0 and verdict.encode() in said
    # The limit of processor time kills; bubblewrap gives 128 + 9 for it.
    timed_out = code in (None, -signal.SIGKILL, 128 + signal.SIGKILL)
    return Outcome(passed, "" if passed else "timed out" if timed_out else last or "ended early")


def _bwrap_path() -> str:
    path = shutil.which("bwrap")
    if path is None:
        raise ConfigError(
            "--allow-code-execution: bubblewrap, in which the programs run, is not installed: "
            f"apt-get install bubblewrap, or dnf install bubblewrap; {UNSAFE_ADVICE}"
        )
    return path


def _is_host_root() -> bool:
    # Root of a user namespace is some user outside, and limited as one.
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == _ALL_IDS


def _bwrap(limits: Limits, info: int) -> list[str]:
    """Return bubblewrap's command line up to the command that it runs.

    `info` is the descriptor of the file into which it writes the process id of the sandbox's first process.
    """
    if _is_host_root():
        # The kernel does not limit root's number of processes, so the driver becomes another user. Bubblewrap's user
        # namespace would have no other user.
        rights = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        rights += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    else:
        rights = ["--unshare-all", "--unshare-user", "--uid", "1000", "--gid", "1000"]
    python = Path(sys.base_prefix).resolve()
    above = [str(path) for path in reversed(python.parents)]  # created with mode 755, since their own can exclude users
    return [
        *(_bwrap_path(), "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL", *rights),
        *(word for path in _SYSTEM_PATHS for word in ("--ro-bind-try", path, path)),
        *("--dev", "/dev", "--remount-ro", "/dev"),
        # The locks of multiprocessing lie in /dev/shm.
        *("--perms", "1777", "--size", str(limits.disk_bytes), "--tmpfs", "/dev/shm"),
        *("--perms", "1777", "--size", str(limits.disk_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *(word for path in above[1:] for word in ("--dir", path)),
        *("--ro-bind", str(python), str(python), "--remount-ro", "/"),
        *("--setenv", "HOME", "/tmp", "--info-fd", str(info), "--"),
    ]


def _options(limits: Limits, status: int, verdict: str, *, sandboxed: bool) -> dict[str, Any]:
    """Return the driver's options; `status` is the descriptor of the pipe into which it writes that it has begun."""
    values = {
        "RLIMIT_CPU": limits.cpu_s,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    if sandboxed:  # outside of the sandbox, all processes of the user would count
        values["RLIMIT_NPROC"] = limits.processes
    # Processes are counted per user, so programs that run at the same time need different users.
    user_id = _FIRST_PRIVATE_ID + secrets.randbelow(_FIRST_PRIVATE_ID) if sandboxed and _is_host_root() else None
    return {"user_id": user_id, "limits": values, "status": status, "verdict": verdict}


def _kill_and_wait(process: subprocess.Popen[bytes], info: IO[bytes] | None) -> None:
    """Kill everything that the program started, and wait until it has ended.

    `info` is the file into which bubblewrap wrote the process id of the sandbox's first process: killing that one ends
    all others, and bubblewrap itself last. Without a sandbox `info` is None, and the process group is killed.
    """
    with contextlib.suppress(ProcessLookupError):
        if info is None:
            os.killpg(process.pid, signal.SIGKILL)
        elif process.poll() is None:
            first = re.search(r'"child-pid": (\d+)', _content(info))
            os.kill(int(first[1]) if first else process.pid, signal.SIGKILL)
    process.wait()


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


Document = Mapping[str, Any]


def score_programs(
    benchmark: Benchmark, shots: int, answers: Sequence[tuple[Document, str]], *, sandboxed: bool = True
) -> Score:
    """Compute pass@1 with one answer to each document: the share of programs that run to their end."""
    make = _PROGRAMS[benchmark.name]
    outcomes = run_programs([make(document, answer) for document, answer in answers], sandboxed=sandboxed)
    value, stderr = mean_and_stderr([float(outcome.passed) for outcome in outcomes])
    timed_out = sum(outcome.reason == "timed out" for outcome in outcomes) / len(outcomes)
    return Score(
        benchmark.name, benchmark.title, benchmark.metric, shots, value, stderr, len(outcomes), {"timed_out": timed_out}
    )


def humaneval_program(document: Document, answer: str) -> str:
    """Return a program of the prompt's function, completed by the answer, its test, and the call of that test."""
    return f"{document['prompt']}{answer}\n\n{document['test']}\n\ncheck({document['entry_point']})\n"


def mbpp_program(document: Document, answer: str) -> str:
    """Return a program of the answer, the document's set-up code and its assertions."""
    return "\n".join((answer, document["test_setup_code"], *document["test_list"], ""))


_PROGRAMS: Mapping[str, Callable[[Document, str], str]] = {"humaneval": humaneval_program, "mbpp": mbpp_program}
