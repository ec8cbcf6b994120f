"""DeepSpeed's launcher as a child of ours, which gets no signal of the terminal: signals go to the ranks alone.

A Ctrl-C in a terminal comes to every process there. Of DeepSpeed's two launchers the outer one then ends with a
traceback and code 130, and the inner one kills the ranks after 30 s, saved or not. Here the ranks alone get the signal;
they save, and their exit code comes back through both launchers.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from types import FrameType
from typing import Any

import psutil

from ddk_ds.command_line import EXIT_ENDED_AT_ONCE, EXIT_INTERRUPTED, EXIT_USER_ERROR, EXIT_WRONG_NUMBERS

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_OF_A_RUN = (0, EXIT_USER_ERROR, EXIT_WRONG_NUMBERS, EXIT_INTERRUPTED)
# A rank that waits in a collective does not hear a second Ctrl-C.
_LAST_WAIT_S = 10
_INNER = ["-u", "-m", "deepspeed.launcher.launch"]


def run_launcher(command: Sequence[str], **options: Any) -> int:
    """Run a launcher's `command` to its end in a process group of its own, and return the run's exit code.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP of this process go to this node's ranks. Before there are ranks, and where they
    are on other nodes, the launchers get SIGTERM in their place. Ctrl-Z stops the run too, until `fg` or `bg`. After a
    second SIGINT everything is killed that does not end in 10 s. Must be called in the main thread.

    Args:
        options: further arguments of `subprocess.Popen`, for example stdout.
    """
    return _Launched().run(command, options)


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
        try:
            # A process group in the terminal's background may write to it, but must not read.
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, **options)
            if self._signals:
                self._process.terminate()
            code = self._process.wait()
        finally:
            signal.alarm(0)
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._signals and code not in _OF_A_RUN:
            return EXIT_ENDED_AT_ONCE
        return code if code >= 0 else 128 - code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        if self._process is None:
            return
        launchers, ranks = _processes(self._process.pid)
        for process in ranks or launchers:
            try:
                process.send_signal(number if ranks else signal.SIGTERM)
            except psutil.NoSuchProcess:
                pass
        if self._signals.count(signal.SIGINT) > 1:
            signal.alarm(_LAST_WAIT_S)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        if self._process is not None:  # somebody has continued this process
            os.killpg(self._process.pid, signal.SIGCONT)

    def _kill(self, number: int, frame: FrameType | None) -> None:
        assert self._process is not None, "the alarm was set when it got a signal"
        os.killpg(self._process.pid, signal.SIGKILL)


def _processes(outer: int) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Return the launchers on this node, the outer one with the process id `outer` first, and their ranks."""
    launchers, ranks = [], []
    try:
        process = psutil.Process(outer)
        launchers.append(process)
        for child in process.children():
            if child.cmdline()[1:4] == _INNER:
                launchers.append(child)
                ranks += child.children()
    except psutil.NoSuchProcess:  # it has just ended
        pass
    return launchers, ranks
