"""Everything that a run records while it trains: the ledger and its events, and the monitors.

`ledger.jsonl` has the numbers that the run computed, one JSON line per optimizer step and per interval. Interrupted
anywhere and resumed, it equals that of an uninterrupted run except for the values under "clock". `events.jsonl` has
what happened to the run: starts, resumes, checkpoints, its end. Monitors get the ledger's numbers as named events.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event as Flag
from threading import Thread
from typing import Any

import xxhash

from ddk_ds.engine.monitors import Event, Writer, close_writers
from ddk_ds.errors import CheckpointError
from ddk_ds.files import sync, written
from ddk_ds.redact import redact
from ddk_ds.train.checkpoint.checkpoint_files import LEDGER


class Ledger:
    """Appends records to ledger.jsonl and events.jsonl. Only rank 0 writes; on other ranks every call does nothing."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = run_dir / LEDGER
        self._events = run_dir / "events.jsonl"
        self._writes = rank == 0
        self._length, self._digest = 0, xxhash.xxh64()

    def write(self, record: dict[str, Any]) -> None:
        """Append a line of numbers to ledger.jsonl; `rewind` makes the file.

        Raises CheckpointError if it cannot be written, or is not as this object left it: a run whose directory was
        deleted must not go on in a new one, nor two runs in one.
        """
        if not self._writes:
            return
        line = _line(record)
        with written(self._path):
            if not self._path.is_file() or self._path.stat().st_size != self._length:
                raise CheckpointError(
                    f"{self._path} was deleted or changed while the run wrote it; put the run's directory back, then "
                    "start the same command again"
                )
            with self._path.open("ab") as stream:
                stream.write(line)
        self._length += len(line)
        self._digest.update(line)

    def event(self, kind: str, **values: Any) -> None:
        """Append an event to events.jsonl with the time of day (seconds since 1970)."""
        if self._writes:
            with written(self._events):
                _append(self._events, _line({"event": kind, "time_s": round(time.time(), 3), **values}))

    def position(self) -> tuple[int, str]:
        """Return the bytes and the xxh64 of ledger.jsonl, for the checkpoint; only rank 0's are meant."""
        return self._length, self._digest.hexdigest()

    def rewind(self, position: int) -> None:
        """Cut ledger.jsonl to `position` bytes, its length at a checkpoint; move later lines to ledger.discarded.jsonl.

        The file must have them (`usable_checkpoint` looks). Raises CheckpointError if it cannot be written.
        """
        if not self._writes:
            return
        discarded = self._path.with_name("ledger.discarded.jsonl")
        with written(self._path), self._path.open("ab+") as stream:
            stream.seek(0)
            kept = stream.read(position)
            assert len(kept) == position, "the ledger is shorter than at the checkpoint"
            if later := stream.read():
                _append(discarded, later)
                sync(discarded)
                stream.truncate(position)
        self._length, self._digest = position, xxhash.xxh64(kept)


def _line(record: dict[str, Any]) -> bytes:
    return (redact(json.dumps(record)) + "\n").encode()


def _append(path: Path, lines: bytes) -> None:
    """Append lines to a file, after the end of a line that a full disk or a kill left unfinished. Raises OSError."""
    with path.open("ab+") as stream:
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(lines)


_STEP = {"loss": "loss/total", "ce": "loss/ce", "kl": "loss/kl", "router_aux_loss": "loss/router"}
_STEP |= {"grad_norm": "optimizer/grad_norm", "learning_rate": "optimizer/learning_rate"}
_INTERVAL = {"student_ppl": "student_ppl", "teacher_ppl": "teacher_ppl", "ratio": "ratio", "proportions": "proportion"}
_CLOCK = {
    "teacher_samples": "speed/teacher_samples",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
    "peak_memory_gb": "memory/peak_gb",
}
_CLOCK |= {key: f"memory/{key}" for key in ("reserved_gb", "alloc_retries", "alloc_ooms")}

_LONGEST_CLOSE_S = 60.0


def events(record: Mapping[str, Any]) -> list[Event]:
    """Return the events of one line of the ledger; pure. A number that is missing or not finite has no event.

    Continuations of prompts become texts, which the monitors with a place for texts show.
    """
    if record["kind"] == "samples":
        return [Event(f"samples/{sample['name']}", _shown(sample), record["step"]) for sample in record["samples"]]
    step = record["kind"] == "step"
    group = "time" if step else "measurement"
    clock = dict(record["clock"])
    values: dict[str, Any] = {f"memory/{part}_gb": value for part, value in clock.pop("peak_gb", {}).items()}
    values |= {_CLOCK.get(key, f"{group}/{key}"): value for key, value in clock.items()}
    if step:
        values |= {name: record.get(key) for key, name in _STEP.items()}
        method = record.get("method", {})
        values |= {f"method/{key}": value for key, value in method.items() if isinstance(value, float)}
    else:
        for key, name in _INTERVAL.items():
            values |= {f"{name}/{domain}": value for domain, value in (record[key] or {}).items()}
        values |= {f"domain_tokens/{domain}": value for domain, value in record["domain_tokens"].items()}
        ratios = list((record["ratio"] or {}).values())
        values["mixture/mean_ratio"] = sum(ratios) / len(ratios) if ratios else None
        values["mixture/alarms"] = len(record["alarms"])
    return [Event(name, float(value), record["step"]) for name, value in values.items() if value is not None]


def _shown(sample: Mapping[str, Any]) -> str:
    return "\n\n".join(
        f"{part}: {sample[part]}" for part in ("prompt", "student", "teacher") if sample[part] is not None
    )


class MonitorFeed:
    """Writes the ledger's numbers to the monitors in a separate thread, as one batch every `every_s` seconds."""

    def __init__(self, writers: Mapping[str, Writer], every_s: float, warn: Callable[[str], None]) -> None:
        """Start the thread, unless `writers` (name of a monitor -> its writer) is empty.

        `warn` is called with a message when a monitor fails, which then gets no more numbers.
        """
        self._writers = dict(writers)
        self._every_s = every_s
        self._warn = warn
        self._records: SimpleQueue[Mapping[str, Any] | None] = SimpleQueue()
        self._closing = Flag()
        self._thread = Thread(target=self._write_all, name="monitors", daemon=True)
        self._seconds = 0.0
        if self._writers:
            self._thread.start()

    def add(self, record: Mapping[str, Any]) -> None:
        """Queue the numbers of one line of the ledger."""
        if self._writers:
            self._records.put(record)

    def close(self) -> None:
        """Hand over the last numbers and wait until they are written, for a minute at most."""
        if not self._thread.is_alive():
            return
        self._closing.set()
        self._records.put(None)
        self._thread.join(_LONGEST_CLOSE_S)
        if self._thread.is_alive():
            self._warn("warning: a monitor does not answer; its last numbers may be missing")

    def take_seconds(self) -> float:
        """Return the processor seconds that monitoring has taken since the last call."""
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
        """Do `work` and return True; on any error warn and return False: a failed monitor must not end the run."""
        try:
            work()
        except Exception as error:  # a library or a remote service can raise anything
            self._warn(f"warning: monitor {name} failed and is left out from here on: {error}")
            return False
        return True
