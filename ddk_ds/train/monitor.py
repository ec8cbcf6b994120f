"""The ledger's numbers as named events, handed to the monitors now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ddk_ds.engine.monitors import Event, Writer, close_writers

_STEP = {"loss": "loss/total", "ce": "loss/ce", "kl": "loss/kl"}
_STEP |= {"grad_norm": "optimizer/grad_norm", "learning_rate": "optimizer/learning_rate"}
_INTERVAL = {"student_ppl": "student_ppl", "teacher_ppl": "teacher_ppl", "ratio": "ratio", "proportions": "proportion"}
_CLOCK = {"tokens_per_s": "speed/tokens_per_s", "peak_memory_gb": "memory/peak_gb"}


def events(record: Mapping[str, Any]) -> list[Event]:
    """The events of a line of the ledger; pure. A number that is missing or not finite has none."""
    step = record["kind"] == "step"
    group = "time" if step else "measurement"
    found: dict[str, Any] = {_CLOCK.get(key, f"{group}/{key}"): value for key, value in record["clock"].items()}
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
    """Collects events and hands them on every `every_s` seconds, at a measurement, and at the end."""

    def __init__(self, writers: Mapping[str, Writer], every_s: float, complain: Callable[[str], None]) -> None:
        self._writers = dict(writers)
        self._every_s = every_s
        self._complain = complain
        self._events: list[Event] = []
        self._written = time.monotonic()
        self._seconds = 0.0

    def add(self, record: Mapping[str, Any]) -> None:
        """Take a line of the ledger."""
        if not self._writers:
            return
        started = time.perf_counter()
        self._events += events(record)
        self._seconds += time.perf_counter() - started
        if record["kind"] != "step" or time.monotonic() - self._written >= self._every_s:
            self.flush()

    def flush(self) -> None:
        """Hand on what there is. A monitor that fails is left out from then on: the run does not depend on one."""
        started = time.perf_counter()
        for name, write in list(self._writers.items()) if self._events else ():
            try:
                write(self._events)
            except Exception as error:  # of a library, of a service somewhere: anything
                del self._writers[name]
                self._complain(f"warning: monitor {name} failed and is left out from here on: {error}")
        self._events = []
        self._written = time.monotonic()
        self._seconds += time.perf_counter() - started

    def close(self) -> None:
        """Hand on what there is, and wait until it is written."""
        self.flush()
        try:
            close_writers()
        except Exception as error:
            self._complain(f"warning: a monitor's last numbers may be missing: {error}")

    def take_seconds(self) -> float:
        """Seconds that monitoring has taken since the last call."""
        taken, self._seconds = self._seconds, 0.0
        return taken
