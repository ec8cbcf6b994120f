"""Readers of the files in a run's directory: ledger.jsonl, events.jsonl, summary.json. They need no torch.

A last line that a crash cut off is left out. Elsewhere a damaged line of the ledger is an error, because its numbers
would be missing; one of the events, which a full disk leaves, is passed over, and an event says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddk_ds.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from ddk_ds.run_schema import Kind

_BLOCK_BYTES = 1 << 20
_STEP = b'{"kind": "step"'
_SAMPLES = b'{"kind": "samples"'


UNREADABLE = "unreadable"
"""Kind of the event that stands in the place of a damaged line of events.jsonl."""


def read_ledger(run_dir: Path) -> list[dict[str, Any]]:
    """Return every complete line of a run's ledger. Raises CheckpointError if the file is missing or damaged."""
    path = _existing(run_dir, "ledger.jsonl")
    return [_record(path, f"line {number}", line) for number, line in _complete_lines(path)]


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return every complete line of a run's events.jsonl. Raises CheckpointError if the file is missing.

    In place of a damaged line there is an event of kind `UNREADABLE` with a text, at the time of the event before it.
    """
    path = _existing(run_dir, "events.jsonl")
    events: list[dict[str, Any]] = []
    for number, line in _complete_lines(path):
        try:
            events.append(_parsed("event", line))
        except ValueError:
            text = f"{path.name}, line {number}: damaged, as a full disk leaves it; left out"
            events.append({"event": UNREADABLE, "time_s": None, "text": text})
    if not events or (is_finished(run_dir) and events[-1]["event"] not in ("end", UNREADABLE)):
        text = f"{path.name}: its last lines are missing"
        events.append({"event": UNREADABLE, "time_s": None, "text": text})
    known = next((event["time_s"] for event in events if event["event"] != UNREADABLE), 0.0)
    for event in events:
        known = event["time_s"] = known if event["event"] == UNREADABLE else event["time_s"]
    return events


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
        records.append(_record(path, "near its end", line))
        steps, measurements = steps - is_step, measurements - (not is_step)
        if steps <= 0 and measurements <= 0:
            break
    return records[::-1]


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Return the summary of a finished run. Raises CheckpointError if there is none, or a damaged one."""
    path = run_dir / "summary.json"
    if not is_finished(run_dir):
        raise CheckpointError(f"{run_dir}: holds no summary.json: no such run, or it is not finished")
    try:
        return _parsed("summary", path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); put it back from a copy, or delete it and start the run's command "
            "again: it continues from its last checkpoint and writes it"
        ) from error


@contextmanager
def complete_files(run_dir: Path) -> Iterator[None]:
    """Raise CheckpointError if the block does not find in a run's files what a run writes there."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{run_dir}: ledger.jsonl, events.jsonl or summary.json lacks what a run writes there "
            f"({type(error).__name__}: {error}); take them from a copy"
        ) from error


def check_end(run_dir: Path, records: Sequence[dict[str, Any]], steps: int) -> None:
    """Raise CheckpointError unless the last lines of a finished run's ledger are of its end, after so many steps."""
    last = next((record for record in reversed(records) if record["kind"] in ("interval", "end")), None)
    if last is None or last["kind"] != "end" or last["step"] != steps:
        raise CheckpointError(
            f"{run_dir / 'ledger.jsonl'}: does not end at step {steps:,}, as summary.json says the run did: one of the "
            "two was cut or replaced; take it from a copy"
        )


def is_finished(run_dir: Path) -> bool:
    """Return True if the run in this directory has come to its end."""
    return (run_dir / "summary.json").is_file()


def _existing(run_dir: Path, name: str) -> Path:
    path = run_dir / name
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; is {run_dir} the directory of a run?")
    return path


def _complete_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number and text of each line, from 1, except a last one that was cut off."""
    return enumerate(path.read_bytes().split(b"\n")[:-1], 1)


def _record(path: Path, where: str, line: bytes) -> dict[str, Any]:
    try:
        return _parsed("ledger", line)
    except ValueError as error:
        shown = line[:60].decode("utf-8", "replace")
        raise CheckpointError(
            f"{path}, {where}: damaged ({error}), it begins {shown!r}; take the file from a copy"
        ) from error


def _parsed(kind: Kind, text: bytes) -> dict[str, Any]:
    from ddk_ds.run_schema import parsed  # imports pydantic, for which `import ddk_ds` should not wait

    return parsed(kind, text)


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
