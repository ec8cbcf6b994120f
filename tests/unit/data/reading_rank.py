"""A rank as test_data_readers.py needs it: it reads by its processes, says what it saw, and waits for a store.

Its samples need none of the imports of real ones, which take seconds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from itertools import islice
from typing import Any

import numpy as np

from ddk_ds.data import readers as module
from ddk_ds.data.mds import Packed
from ddk_ds.data.readers import Readers
from ddk_ds.errors import TemporaryError

STUCK = 999


class Samples:
    """Sample i holds i, and is of domain i % 3; that of id STUCK never comes."""

    def read(self, sample_id: int) -> tuple[Packed, int]:
        """Read it, in a time that differs from sample to sample."""
        time.sleep(600.0 if sample_id == STUCK else 0.002 * (sample_id % 5))
        return Packed(np.full(4, sample_id, np.uint16), None), sample_id % 3


def batches_of(first: int, number: int) -> list[list[int]]:
    """`number` micro-batches of two samples, from sample `first` on."""
    return [[first + 2 * i, first + 2 * i + 1] for i in range(number)]


def open_files(pid: int) -> set[str]:
    """What the file descriptors of a process lead to."""
    return {os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")}


def error_of(readers: Readers, samples: Samples, batches: list[list[int]]) -> str:
    """The error of reading these."""
    try:
        list(readers.read(samples, batches))
    except TemporaryError as error:
        return str(error)
    return ""


def main() -> None:
    """Read, say what was seen, and wait for a sample that never comes, until this process is killed."""
    module._IMPORTED.clear()
    peer = socket.socketpair()  # as NCCL's
    readers, samples = Readers(2), Samples()
    readers.start()
    seen: dict[str, Any] = {"pids": [], "read": []}
    for first in (0, 100, 200):
        kept = 5 if first == 0 else 40  # the first interval is left in its middle, with samples read ahead
        read = list(islice(readers.read(samples, batches_of(first, 40)), kept))
        seen["read"].append([[one.sample_ids, one.domains, one.tokens.tolist()] for one in read])
        seen["pids"].append(readers.pids)
    held = {os.readlink(f"/proc/self/fd/{end.fileno()}") for end in peer}
    seen["held"] = [sorted(open_files(pid) & held) for pid in readers.pids]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        for pid in readers.pids:
            os.kill(pid, number)  # as a terminal or Slurm does, to all processes
    seen["after signals"] = len(list(readers.read(samples, batches_of(300, 3))))
    other = Readers(1)
    other.start()
    os.kill(other.pids[0], signal.SIGKILL)
    seen["killed"] = error_of(other, samples, batches_of(0, 3))
    other.close()
    waiting = Readers(1)
    waiting.start()
    waiting.give_up = lambda: True
    seen["given up"] = error_of(waiting, samples, [[STUCK]])
    waiting.close()
    seen["closed"] = [os.path.exists(f"/proc/{pid}") for pid in (*other.pids, *waiting.pids)]
    print(json.dumps(seen), flush=True)
    next(readers.read(samples, [[STUCK], [STUCK]]))


if __name__ == "__main__":
    main()
