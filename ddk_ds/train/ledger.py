"""The run's ledger: one JSON line per optimizer step and per interval, and a list of events beside it.

`ledger.jsonl` holds what the run computed: cut off anywhere and resumed, it equals that of an uninterrupted run but
for the values under "clock". `events.jsonl` holds what happened to the run: starts, resumes, checkpoints, its end.

The ledger's numbers as named events, handed to the monitors now and then.

What rank 0 shows while the run goes: a live bar on a terminal, a line now and then elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event as Flag
from threading import Thread
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ddk_ds.engine.monitors import Event, Writer, close_writers
from ddk_ds.errors import CheckpointError
from ddk_ds.redact import redact
from ddk_ds.train.step import StepMetrics


class Ledger:
    """Appends records; only rank 0 writes, on the others every call does nothing."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = run_dir / "ledger.jsonl"
        self._events = run_dir / "events.jsonl"
        self._writes = rank == 0

    def write(self, record: dict[str, Any]) -> None:
        """Append a record of the computation."""
        self._append(self._path, record)

    def event(self, kind: str, **values: Any) -> None:
        """Append an event with the time of day (seconds since 1970)."""
        self._append(self._events, {"event": kind, "time_s": round(time.time(), 3), **values})

    def position(self) -> int:
        """Bytes written so far (0 on ranks that do not write): goes into the checkpoint."""
        return self._path.stat().st_size if self._writes and self._path.is_file() else 0

    def rewind(self, position: int) -> None:
        """Go back to a checkpoint's position; lines after it move to ledger.discarded.jsonl."""
        if not self._writes:
            return
        size = self.position()
        if size < position:
            raise CheckpointError(
                f"{self._path} has {size} bytes, the checkpoint was written at {position}: the ledger was cut or "
                "replaced; put it back, or start a new run under another name"
            )
        if size > position:
            with self._path.open("r+b") as stream:
                stream.seek(position)
                with self._path.with_name("ledger.discarded.jsonl").open("ab") as discarded:
                    discarded.write(stream.read())
                    discarded.flush()
                    os.fsync(discarded.fileno())
                stream.truncate(position)

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        if not self._writes:
            return
        try:
            with path.open("a", encoding="utf-8") as stream:
                stream.write(redact(json.dumps(record)) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written: {error.strerror}; make room, then start the same command again: the run "
                "goes on from its newest checkpoint"
            ) from error


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


_LINE_EVERY_S = 10.0


class RunProgress:
    """Steps, loss, speed, ETA, the interval and its proportions. On ranks other than 0 it shows nothing."""

    def __init__(self, rank: int, total_steps: int, names: Sequence[str]) -> None:
        self.console = Console(quiet=rank != 0, file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())
        self._names = names
        self._total = total_steps
        self._live = rank == 0 and sys.stdout.isatty()
        self._last_line = 0.0
        self._interval = ""
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("step", total=total_steps, metrics="")

    def start(self, step: int) -> None:
        """Show the bar at `step`."""
        self._bar.start()
        self._bar.update(self._task, completed=step)

    def stop(self) -> None:
        """Leave the terminal to others."""
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(redact(text))

    def interval(self, number: int, proportions: Sequence[float]) -> None:
        """A new interval has begun."""
        mixture = "  ".join(f"{name} {share:.1%}" for name, share in zip(self._names, proportions, strict=True))
        self._interval = f"interval {number}"
        self.say(f"interval {number}: {mixture}")

    def step(self, step: int, metrics: StepMetrics, tokens_per_s: float) -> None:
        """An optimizer step is done."""
        text = f"loss {metrics.loss:.4f}  CE {metrics.ce:.4f}  KL {metrics.kl:.4f}  {tokens_per_s:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, metrics=f"{self._interval}  {text}")
        now = time.monotonic()
        if not self._live and (now - self._last_line > _LINE_EVERY_S or step == self._total):
            self._last_line = now
            remaining = (self._total - step) * sum(metrics.domain_tokens) / max(1e-9, tokens_per_s)
            self.say(f"step {step}/{self._total}  {self._interval}  {text}  ETA {remaining:,.0f} s")
