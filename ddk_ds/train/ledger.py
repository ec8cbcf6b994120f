"""The run's ledger: one JSON line per optimizer step and per interval, and a list of events beside it.

`ledger.jsonl` holds what the run computed: cut off anywhere and resumed, it equals that of an uninterrupted run but
for the values under "clock". `events.jsonl` holds what happened to the run: starts, resumes, checkpoints, its end.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from ddk_ds.errors import CheckpointError
from ddk_ds.redact import redact


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
