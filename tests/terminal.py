"""A real terminal for a command: its output as a person sees it, its keys, and its exit code as a shell shows it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
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

CTRL_C, CTRL_Z = b"\x03", b"\x1a"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A command in the foreground of a terminal of its own."""

    def __init__(self, command: Sequence[str], *, columns: int = 80, **options: Any) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_the_terminal,
            **options,
        )
        os.close(slave)
        self._output = b""
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
        self._reader.join(timeout=5)
        return code if code >= 0 else 128 - code

    def close(self) -> None:
        """Hang up, as a window that is closed, and end what is left of the session."""
        with suppress(OSError):
            os.close(self._master)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read(self) -> None:
        with suppress(OSError):  # EIO: no process has the terminal any more
            while data := os.read(self._master, 65536):
                self._output += data


def _take_the_terminal() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background ignores it, and so would its children
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
