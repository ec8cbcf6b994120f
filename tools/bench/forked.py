"""Ranks and commands in processes forked from a server that has imported DeepSpeed, Transformers and the commands.

A start then takes none of the seconds of imports, and no launcher. What a launcher does is done here: a process in a
session of its own forks the ranks, waits for them, and ends the others when one fails.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from io import TextIOWrapper
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from ddk_ds.launcher import free_port
from tools.bench.file_operations import Operation, Strike, look_at, read_operations

SERVER = multiprocessing.get_context("forkserver")
"""Its processes are forked from one that has imported what every start needs; set by `set_forkserver_preload`."""
READERS = ("status", "report", "replay", "summary", "export")
_RANK = "ddk_ds.commands.distill_rank"
PRELOADED = [
    *("ddk_ds.train.loop", "ddk_ds.train.setup", "ddk_ds.train.preflight", "ddk_ds.report.page"),
    *(_RANK, "ddk_ds.commands.export_work", *(f"ddk_ds.commands.{name}_command" for name in READERS)),
]
LIMIT_S = 600.0
"""Seconds after which a job that has not ended counts as a hang."""
_NOW = 2e9
_LAST_WORDS_S = 2.0  # DeepSpeed's launcher looks for ended ranks once a second
_SAVING_S = 30.0  # it kills ranks that have not ended so long after its SIGTERM


def rank_environment(rank: int, world: int, port: int, per_node: int | None = None) -> dict[str, str]:
    """Return the variables by which a launcher tells a rank its place; `per_node` ranks on a node, None: all."""
    local = per_node or world
    place = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": local, "LOCAL_SIZE": local, "MASTER_PORT": port}
    place |= {"RANK": rank, "LOCAL_RANK": rank % local}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}


class Said(NamedTuple):
    """Output of a command, both streams, and its exit code; None if it had to be killed."""

    code: int | None
    text: str


class ForkedJob:
    """A run without a launcher, whose file operations are written down."""

    def __init__(self, config: Path, run_dir: Path, ranks: int, strike: Strike | None = None) -> None:
        self.run_dir = run_dir
        self.killed = False
        """True if the job was killed because it did not end."""
        self._config = config
        self._ranks = ranks
        self._strike = strike

    def run(self, limit_s: float = LIMIT_S) -> int | None:
        """Run to the end of every process. Returns the exit code, or None if they had to be killed.

        The code is that of the first rank that failed; that of a signal is below 0.
        """
        code = run_session(_node, (self._config, self.run_dir.parent, self._ranks, self._strike), limit_s)
        self.killed = code is None
        return code

    def output(self) -> str:
        """Return what all ranks have written since the last start."""
        return "\n".join(self._log(rank, "txt").read_text(errors="replace") for rank in range(self._ranks))

    def operations(self) -> list[Operation]:
        """Return the file operations of the last start below the parent of the run's directory, rank by rank."""
        return [step for rank in range(self._ranks) for step in read_operations(self._log(rank, "operations"), rank)]

    def _log(self, rank: int, kind: str) -> Path:
        return rank_log(self._config, rank, kind)


def rank_log(config: Path, rank: int, kind: str) -> Path:
    """Return the file of a rank's output (`txt`) or file operations (`operations`)."""
    return config.with_name(f"{config.stem}-rank{rank}.{kind}")


def run_session(target: Callable[..., None], arguments: tuple[Any, ...], limit_s: float = LIMIT_S) -> int | None:
    """Call `target` in a forked process that leads a session, and wait until the session has no process.

    Returns the exit code, that of a signal below 0; None if processes had to be killed after `limit_s` seconds.
    """
    SERVER.set_forkserver_preload(PRELOADED)
    process: BaseProcess = SERVER.Process(target=_lead, args=(target, arguments))
    process.start()
    assert process.pid is not None
    end, killed = time.monotonic() + limit_s, False
    while process.exitcode is None or in_session(process.pid):
        if time.monotonic() > end:
            killed = True
            for left in in_session(process.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
        time.sleep(0.02)
    code = process.exitcode
    return None if killed else code - 256 if code > 128 else code


def run_commands(commands: Sequence[Sequence[str]], folder: Path, limit_s: float = LIMIT_S) -> list[Said]:
    """Run commands of `ddk`, each `[name, argument, ...]`, one after the other in one forked process.

    Their clock stands still and their disk has a round number of free bytes, so that two calls print the same. What
    they print goes to files in `folder`. A command that has not ended after `limit_s` seconds, and those after it, have
    the code None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run_session(_commands, (commands, folder), limit_s)
    said = []
    for place in range(len(commands)):
        text, code = folder / f"{place}.txt", folder / f"{place}.code"
        shown = text.read_text(errors="replace") if text.is_file() else ""
        said.append(Said(int(code.read_text()) if code.is_file() else None, shown))
    return said


def in_session(leader: int) -> list[psutil.Process]:
    """Return the living processes of a session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _lead(target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # it was the server's for this process
    target(*arguments)


def _commands(commands: Sequence[Sequence[str]], folder: Path) -> None:
    time.time = lambda: _NOW
    usage = shutil.disk_usage(folder)._replace(free=10**12)
    shutil.disk_usage = lambda path: usage
    for place, (name, *arguments) in enumerate(commands):
        redirect(folder / f"{place}.txt")
        main = importlib.import_module(f"ddk_ds.commands.{name}_command").main
        (folder / f"{place}.code").write_text(str(code_of(partial(main, arguments))))


def _node(config: Path, folder: Path, world: int, strike: Strike | None) -> None:
    """Be the launcher of a node: fork the ranks, and exit with the code of the first that fails."""
    port = free_port()
    ranks: set[int] = set()
    for rank in range(world):
        process = os.fork()
        if process == 0:
            redirect(rank_log(config, rank, "txt"))
            log = rank_log(config, rank, "operations")
            # One thread each: with more, threads that wait for one another stand still on a machine at work.
            os.environ.update(rank_environment(rank, world, port) | {"OMP_NUM_THREADS": "1"})
            torch.set_num_threads(1)
            os._exit(code_of(partial(_rank, config, folder, rank, log, strike)))
        ranks.add(process)
    os._exit(_supervise(ranks) % 256)


def _supervise(ranks: set[int]) -> int:
    """Wait for the processes; when one fails, end the others as DeepSpeed's launcher does. Returns the first failure.

    A code below 0 is the number of a signal.
    """
    first, failed_at, sent = 0, 0.0, 0
    while ranks:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            ranks.discard(process)
            if not first and (first := os.waitstatus_to_exitcode(status)):
                failed_at = time.monotonic()
            continue
        waited = time.monotonic() - failed_at if first else 0.0
        number = signal.SIGKILL if waited > _SAVING_S else signal.SIGTERM if waited > _LAST_WORDS_S else 0
        if number and number != sent:
            sent = number
            for rank in ranks:
                os.kill(rank, number)
        time.sleep(0.01)
    return first


def _rank(config: Path, folder: Path, rank: int, log: Path, strike: Strike | None) -> int:
    look_at(folder, rank, log, strike)
    main: Callable[[Sequence[str]], int] = importlib.import_module(_RANK).main
    return main(["--config", str(config)])


def redirect(path: Path) -> None:
    """Write this process's stdout and stderr to a new file from here on."""
    with path.open("wb", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, TextIOWrapper), "the interpreter's own"
        stream.reconfigure(line_buffering=True)
    faulthandler.enable()


def code_of(main: Callable[[], int]) -> int:
    """Return the exit code of a process that calls `main`; 1 after a traceback."""
    code: Any = 1
    try:
        code = main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # the interpreter would print any of them, and end with 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)
