"""A real terminal for a command: its output as a person sees it, its keys, and its exit code as a shell shows it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

CTRL_C, CTRL_Z = b"\x03", b"\x1a"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A command in the foreground of a terminal of its own."""

    def __init__(self, command: Sequence[str], *, columns: int = 80, **options: Any) -> None:
        self._master, slave = pty.openpty()
        environment = dict(options.pop("env", os.environ))
        for name in ("COLUMNS", "LINES"):  # would stand above the terminal's own size
            environment.pop(name, None)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_the_terminal,
            env=environment,
            **options,
        )
        os.close(slave)
        self._output = b""
        self._hung_up = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def press(self, key: bytes) -> None:
        os.write(self._master, key)

    @property
    def lines(self) -> list[str]:
        """Every line that was shown, those that were overwritten later too, without colours and empty lines."""
        text = _ESCAPES.sub("", self._output.decode(errors="replace"))
        return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, done: Any, timeout_s: float = 200.0) -> None:
        """Wait until `done()` is true."""
        end = time.monotonic() + timeout_s
        while not done():
            assert self.process.poll() is None and time.monotonic() < end, self.text[-4000:]
            time.sleep(0.02)

    def wait_for_step(self, ledger: Path, step: int) -> None:
        self.wait_for(lambda: ledger.is_file() and f'"step": {step},' in ledger.read_text())

    def code(self, timeout_s: float = 120.0) -> int:
        """Wait for the end, and return the exit code as a shell gives it: 128 + n after signal n."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout=2)
        return code if code >= 0 else 128 - code

    def is_stopped(self) -> bool:
        """Return True if the command has stopped itself (Ctrl-Z)."""
        return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED

    def resume(self) -> None:
        """Continue the command in the foreground, as a shell's `fg` does."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def hang_up(self) -> None:
        """Close the terminal's window. The kernel sends SIGHUP to the command, which leads the session."""
        self._hung_up.set()
        self._reader.join()  # a read under way would keep it open
        os.close(self._master)

    def close(self) -> None:
        """End what is left of the command."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read(self) -> None:
        with suppress(OSError):  # EIO: no process has the terminal any more
            while not self._hung_up.is_set():
                if select.select([self._master], [], [], 0.1)[0]:
                    self._output += os.read(self._master, 65536)


def hear_signals() -> None:
    """Hear in a new process what this one may ignore: SIGINT in a shell's background, SIGHUP under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _take_the_terminal() -> None:
    hear_signals()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
