"""The tie of a rank to its launcher: when a launcher ends, the ranks below it end too.

`deepspeed`, whose process id a user holds, starts `deepspeed.launcher.launch`, and that starts the ranks; torchrun
starts them itself. None of the three ends its ranks when it is killed. So a thread of each rank looks once a second at
the processes that started it. Linux only: elsewhere nothing is watched.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

LOOK_EVERY_S = 1.0
# Variables by which DeepSpeed's launcher and torchrun are known: a process of Python, alive, has started this one.
_BY_DEEPSPEED, _BY_TORCHRUN = "CROSS_SIZE", "TORCHELASTIC_RUN_ID"


@dataclass(frozen=True)
class Process:
    """A living process, as /proc shows it."""

    pid: int
    began: int
    """Clock ticks from the machine's start to the process's: the same number is given to a later process again."""
    parent: int
    group: int
    command: str

    def started(self, child: Process) -> bool:
        """Return False if `child` has lost its parent, and this process has only taken it over.

        Such a process is the first of the machine or the container, or it is in another process group than a child
        that leads none.
        """
        if self.pid == 1 and "python" not in self.command:
            return False
        return self.group == child.group or child.pid == child.group


def look_up(pid: int) -> Process | None:
    """Return the process of that id; None if there is none, if it has ended, or if this user cannot see it."""
    try:
        state, parent, group, *rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None
    return None if state in (b"Z", b"X") else Process(pid, int(rest[16]), int(parent), int(group), command)


def follow_launcher() -> None:
    """Send this process SIGTERM when a launcher above it ends, or now if one has ended before this rank began.

    Before the training begins the signal ends the process; then it makes the run save and end. Call it before any slow
    import.
    """
    if sys.platform != "linux":
        return
    launchers = _launchers()
    if launchers is None:
        _end("a launcher of this rank ended before the rank began")
    elif launchers:
        Thread(target=_follow, args=(launchers,), name="launcher", daemon=True).start()


def _launchers() -> list[Process] | None:
    """Return the launchers above this process, the nearest first; None if one of them has ended."""
    this = look_up(os.getpid())
    assert this is not None, "this process lives"
    parent = look_up(this.parent)
    if not os.environ.keys() & {_BY_DEEPSPEED, _BY_TORCHRUN}:
        return [] if parent is None else [parent]  # srun, mpirun, a test
    if parent is None or not parent.started(this):
        return None
    if _BY_DEEPSPEED not in os.environ:
        return [parent]
    outer = look_up(parent.parent)
    return None if outer is None or not outer.started(parent) else [parent, outer]


def _follow(launchers: Sequence[Process]) -> None:
    while True:
        for launcher in launchers:
            found = look_up(launcher.pid)
            if found is None or found.began != launcher.began:
                _end(f"a launcher of this rank, process {launcher.pid}, has ended")
                return
        time.sleep(LOOK_EVERY_S)


def _end(why: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):  # nobody may read it any more
            print(f"{why}: the run ends", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
