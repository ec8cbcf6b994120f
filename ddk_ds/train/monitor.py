"""The ledger's numbers as named events, handed to the monitors now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from queue import SimpleQueue
from threading import Event as Flag
from threading import Thread
from typing import Any

from ddk_ds.engine.monitors import Event, Writer, close_writers

_STEP = {"loss": "loss/total", "ce": "loss/ce", "kl": "loss/kl"}
_STEP |= {"grad_norm": "optimizer/grad_norm", "learning_rate": "optimizer/learning_rate"}
_INTERVAL = {"student_ppl": "student_ppl", "teacher_ppl": "teacher_ppl", "ratio": "ratio", "proportions": "proportion"}
_CLOCK = {"tokens_per_s": "speed/tokens_per_s", "mfu": "speed/mfu", "peak_memory_gb": "memory/peak_gb"}

_LONGEST_CLOSE_S = 60.0


def events(record: Mapping[str, Any]) -> list[Event]:
    """The events of a line of the ledger; pure. A number that is missing or not finite has none."""
    step = record["kind"] == "step"
    group = "time" if step else "measurement"
    clock = dict(record["clock"])
    found: dict[str, Any] = {f"memory/{part}_gb": value for part, value in clock.pop("peak_gb", {}).items()}
    found |= {_CLOCK.get(key, f"{group}/{key}"): value for key, value in clock.items()}
    if step:
        found |= {name: record.get(key) for key, name in _STEP.items()}
        method = record.get("method", {})
        found |= {f"method/{key}": value for key, value in method.items() if isinstance(value, float)}
    else:
        for key, group in _INTERVAL.items():
            found |= {f"{group}/{domain}": value for domain, value in (record[key] or {}).items()}
        found |= {f"domain_tokens/{domain}": value for domain, value in record["domain_tokens"].items()}
        ratios = list((record["ratio"] or {}).values())
        found["mixture/mean_ratio"] = sum(ratios) / len(ratios) if ratios else None
        found["mixture/alarms"] = len(record["alarms"])
    return [Event(name, float(value), record["step"]) for name, value in found.items() if value is not None]


class MonitorFeed:
    """Hands events to the monitors in a thread of its own, together what comes within `every_s` seconds."""

    def __init__(self, writers: Mapping[str, Writer], every_s: float, complain: Callable[[str], None]) -> None:
        self._writers = dict(writers)
        self._every_s = every_s
        self._complain = complain
        self._records: SimpleQueue[Mapping[str, Any] | None] = SimpleQueue()
        self._closing = Flag()
        self._thread = Thread(target=self._write_all, name="monitors", daemon=True)
        self._seconds = 0.0
        if self._writers:
            self._thread.start()

    def add(self, record: Mapping[str, Any]) -> None:
        """Take a line of the ledger."""
        if self._writers:
            self._records.put(record)

    def close(self) -> None:
        """Hand on what there is, and wait until it is written, a minute at most."""
        if not self._thread.is_alive():
            return
        self._closing.set()
        self._records.put(None)
        self._thread.join(_LONGEST_CLOSE_S)
        if self._thread.is_alive():
            self._complain("warning: a monitor does not answer; its last numbers may be missing")

    def take_seconds(self) -> float:
        """Processor seconds that monitoring has taken since the last call."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def _write_all(self) -> None:
        started = time.thread_time()
        while (record := self._records.get()) is not None:
            batch = events(record)
            self._closing.wait(self._every_s)
            while not self._records.empty():
                record = self._records.get()
                batch += [] if record is None else events(record)
            self._write(batch)
            self._seconds += time.thread_time() - started
            started = time.thread_time()
            if self._closing.is_set():
                break
        self._call("the last numbers", close_writers)

    def _write(self, batch: list[Event]) -> None:
        for name, write in list(self._writers.items()):
            if not self._call(name, partial(write, batch)):
                del self._writers[name]

    def _call(self, name: str, work: Callable[[], None]) -> bool:
        """Whether it went well. A monitor that fails is left out from then on: the run does not depend on one."""
        try:
            work()
        except Exception as error:  # of a library, of a service somewhere: anything
            self._complain(f"warning: monitor {name} failed and is left out from here on: {error}")
            return False
        return True
