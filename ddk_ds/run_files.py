"""Readers of the files in a run's directory: ledger.jsonl, events.jsonl, summary.json. They need no torch.

A last line that a crash cut off is left out; a line that is damaged elsewhere is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddk_ds.errors import CheckpointError

_BLOCK_BYTES = 1 << 20
_STEP = b'{"kind": "step"'
_SAMPLES = b'{"kind": "samples"'


def read_ledger(run_dir: Path) -> list[dict[str, Any]]:
    """Return every complete line of a run's ledger. Raises CheckpointError if the file is missing or damaged."""
    return _complete_lines(run_dir, "ledger.jsonl")


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return every complete line of a run's events.jsonl. Raises CheckpointError if it is missing or damaged."""
    return _complete_lines(run_dir, "events.jsonl")


def read_ledger_end(run_dir: Path, *, steps: int, measurements: int) -> list[dict[str, Any]]:
    """Return the last lines of a ledger in its order, without continuations, read from the end of the file.

    Args:
        steps: number of lines of steps.
        measurements: number of lines of intervals, each with a measurement.

    Raises CheckpointError if the file is missing or damaged.
    """
    path = _existing(run_dir, "ledger.jsonl")
    records: list[dict[str, Any]] = []
    for line in _lines_from_end(path):
        is_step = line.startswith(_STEP)
        if line.startswith(_SAMPLES) or (is_step and steps <= 0):
            continue
        records.append(_parse(path, "near its end", line))
        steps, measurements = steps - is_step, measurements - (not is_step)
        if steps <= 0 and measurements <= 0:
            break
    return records[::-1]


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Return the summary of a finished run. Raises CheckpointError if there is none."""
    if not is_finished(run_dir):
        raise CheckpointError(f"{run_dir}: holds no summary.json: no such run, or it is not finished")
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def is_finished(run_dir: Path) -> bool:
    """Return True if the run in this directory has come to its end."""
    return (run_dir / "summary.json").is_file()


def _existing(run_dir: Path, name: str) -> Path:
    path = run_dir / name
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; is {run_dir} the directory of a run?")
    return path


def _complete_lines(run_dir: Path, name: str) -> list[dict[str, Any]]:
    path = _existing(run_dir, name)
    lines = path.read_bytes().split(b"\n")
    return [_parse(path, f"line {number}", line) for number, line in enumerate(lines[:-1], 1)]


def _parse(path: Path, where: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        shown = line[:60].decode("utf-8", "replace")
        raise CheckpointError(f"{path}, {where}: damaged, it begins {shown!r}; take the file from a copy")
    return record


def _lines_from_end(path: Path) -> Iterator[bytes]:
    """Yield the complete lines of a file, the last line first."""
    with path.open("rb") as stream:
        position = stream.seek(0, 2)
        rest, at_end = b"", True
        while position > 0:
            size = min(_BLOCK_BYTES, position)
            position -= size
            stream.seek(position)
            lines = (stream.read(size) + rest).split(b"\n")
            rest = lines[0]  # its beginning is in the block before, if there is one
            complete = lines[1:]
            if at_end and complete:
                complete, at_end = complete[:-1], False  # after the last line break is nothing, or a cut-off line
            yield from reversed(complete)
        if not at_end:
            yield rest
