"""DeepSpeed's launcher as a child of ours, which gets no signal of the terminal: signals go to the ranks alone.

A Ctrl-C in a terminal comes to every process there. Of DeepSpeed's two launchers the outer one then ends with a
traceback and code 130, and the inner one kills the ranks after 30 s, saved or not. Here the ranks alone get the signal;
they save, and their exit code comes back through both launchers.

A launcher can be killed. What it leaves behind becomes this process's (a "child subreaper" of Linux), which waits for
it: the ranks find their launcher gone (lifeline.py), save, and their exit code is the run's. DeepSpeed's outer launcher
alone would return 0. If this process is killed, the kernel ends the outer launcher, and the ranks find that.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from ddk_ds.command_line import RANK_SCRIPT
from ddk_ds.exit_codes import EXIT_ENDED_AT_ONCE, OF_A_RUN
from ddk_ds.remote_hosts import encoded, variables_of_hosts

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# A rank that waits in a collective does not hear a second Ctrl-C.
_LAST_WAIT_S = 10
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
# Device files of NVIDIA's GPUs, of these in WSL, of AMD's, and of other accelerators.
_ACCELERATORS = ("nvidia[0-9]*", "dxg", "kfd", "dri/render*", "accel*", "davinci*")
_INNER = ["-u", "-m", "deepspeed.launcher.launch"]


def launcher_command(options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Return the command by which DeepSpeed's launcher starts the ranks of a run.

    The launcher says nothing but errors, unless `options` has a --log_level; its port is a free one, unless they have
    a port or hosts.

    Args:
        options: of the launcher, each in the form --name=value.
        arguments: of the run, --config among them.
    """
    names = {option.partition("=")[0] for option in options}
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *options]
    command += [] if "--log_level" in names else ["--quiet"]
    command += [] if names & {"--master_port", "--hostfile"} else [f"--master_port={free_port()}"]
    return [*command, str(RANK_SCRIPT), *encoded(arguments)]


def free_port() -> int:
    """Return the number of a free TCP port of 127.0.0.1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _environment() -> dict[str, str]:
    """Return the environment of the launcher and its ranks."""
    # torch looks for ninja on PATH.
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
    if not any(path for pattern in _ACCELERATORS for path in Path("/dev").glob(pattern)):
        environment.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would say in each process that it found none
    return environment


def run_launcher(command: Sequence[str], **options: Any) -> int:
    """Run a launcher's `command` to its end in a process group of its own, and return the run's exit code.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP of this process go to this node's ranks. Before there are ranks, and where they
    are on other nodes, the launchers get SIGTERM in their place. Ctrl-Z stops the run too, until `fg` or `bg`. After a
    second SIGINT everything is killed that does not end in 10 s. Must be called in the main thread.

    Args:
        options: further arguments of `subprocess.Popen`, for example stdout.
    """
    with variables_of_hosts(os.environ, command) as variables:
        return _Launched().run(command, options | {"env": _environment() | variables})


class _Launched:
    """A launcher that runs, and the signals that came in the meantime."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._signals: list[int] = []

    def run(self, command: Sequence[str], options: dict[str, Any]) -> int:
        handlers: dict[int, Any] = {number: self._pass_on for number in _PASSED_ON}
        handlers |= {signal.SIGTSTP: self._stop, signal.SIGALRM: self._kill}
        heard = {number: handler for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN}
        before = {number: signal.signal(number, handler) for number, handler in heard.items()}
        prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
        if prctl is not None:
            prctl(_PR_SET_CHILD_SUBREAPER, 1)
            options = options | {"preexec_fn": lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)}
        try:
            # A process group in the terminal's background may write to it, but must not read.
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, **options)
            if self._signals:
                self._process.terminate()
            code = _code_of([self._process.wait(), *self._left_behind()])
        finally:
            signal.alarm(0)
            if prctl is not None:
                prctl(_PR_SET_CHILD_SUBREAPER, 0)
            for number, handler in before.items():
                signal.signal(number, handler)
        return EXIT_ENDED_AT_ONCE if self._signals and code not in OF_A_RUN else code

    def _left_behind(self) -> list[int]:
        """Wait for what a launcher that was killed has left behind, and return the exit codes, -n after signal n."""
        assert self._process is not None, "it has ended"
        codes = []
        with suppress(ChildProcessError):
            while True:
                codes.append(os.waitstatus_to_exitcode(os.waitpid(-self._process.pid, 0)[1]))
        return codes

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        if self._process is None:
            return
        launchers, ranks = _processes(self._process.pid)
        for process in ranks or launchers:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number if ranks else signal.SIGTERM)
        if self._signals.count(signal.SIGINT) > 1:
            signal.alarm(_LAST_WAIT_S)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._send_all(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send_all(signal.SIGCONT)  # somebody has continued this process

    def _kill(self, number: int, frame: FrameType | None) -> None:
        self._send_all(signal.SIGKILL)

    def _send_all(self, number: int) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):  # all have just ended
                os.killpg(self._process.pid, number)


def _code_of(codes: Sequence[int]) -> int:
    """Return the run's exit code from those of the outer launcher and of what launchers left behind.

    A rank's own code counts more than that of a launcher, and any failure more than 0, with which DeepSpeed's outer
    launcher ends if the inner one was killed.
    """
    failures = [code if code > 0 else 128 - code for code in codes if code]
    return min(failures, key=lambda code: code not in OF_A_RUN, default=0)


def _processes(outer: int) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Return the launchers on this node of the outer one with the process id `outer`, and the ranks.

    What a launcher that was killed has left behind is a child of this process.
    """
    launchers, ranks = [], []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, ProcessLookupError):  # it has just ended
            if os.getpgid(process.pid) != outer:
                continue
            inner, parent = process.cmdline()[1:4] == _INNER, process.parent()
            if inner or process.pid == outer:
                launchers.append(process)
            elif parent is not None and (parent.pid == os.getpid() or parent.cmdline()[1:4] == _INNER):
                ranks.append(process)
    return launchers, ranks
