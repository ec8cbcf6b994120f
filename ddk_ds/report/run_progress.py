"""The state of a run, read from the files in its directory alone, so that any machine that sees them can tell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ddk_ds.config import Config
from ddk_ds.config.run_config import total_steps
from ddk_ds.run_files import is_finished

Kind = Literal["running", "silent", "finished", "interrupted", "stopped", "timed out"]
_ENDS: dict[str, Kind] = {"interrupted": "interrupted", "stopped": "stopped"}
_PATIENCE_S = 60.0
_PATIENCE_STEPS, _PATIENCE_MEASUREMENTS = 10.0, 2.0
"""A run is silent after _PATIENCE_S, that many last steps or that many last measurements, whichever is longest."""
_TIMED_OUT = "Timeout"
_PHASE = re.compile(r"(step|evaluation|controller|checkpoint|export) after step (\d+)")


@dataclass(frozen=True)
class State:
    """State of a run at one moment."""

    kind: Kind
    text: str
    """Phrase about the state, for a person."""
    age_s: float
    """Time since the run last wrote anything, by the file system's clock and this machine's."""


def run_state(run_dir: Path, events: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], now: float) -> State:
    """Return the state of a run from its events and its last records; `now` is in seconds since 1970."""
    age_s = max(0.0, now - _last_sign(run_dir))
    last = events[-1] if events else {}
    if is_finished(run_dir):
        reason = next((event["reason"] for event in reversed(events) if event["event"] == "end"), "it has a summary")
        return State("finished", f"finished: {reason}", age_s)
    kind = _ENDS.get(str(last.get("event")))
    if kind is not None:
        why = last.get("signal") or last.get("reason") or "?"
        return State(kind, f"{kind} at step {last.get('step', '?')}: {why}", age_s)
    stacks = _stacks(run_dir / "stacks" / "rank-0.txt")
    silent = age_s > _patience(records)
    if silent:  # only then, since there can be thousands of ranks
        names = (run_dir / "stacks").glob("rank-*.txt")
        texts = (_stacks(path) for path in sorted(names) if path.stem.count("-") == 1)  # others are from earlier starts
        stacks = next((text for text in texts if _TIMED_OUT in text), stacks)
    phase = _PHASE.search(stacks)
    where = f", in {phase[1]} after step {int(phase[2]):,}" if phase else ""
    if _TIMED_OUT in stacks:
        return State("timed out", f"timed out{where}: stacks/ shows what each rank was doing", age_s)
    if silent:
        return State("silent", f"silent for {duration(age_s)}{where}", age_s)
    return State("running", f"running{where}", age_s)


def expected_steps(config: Config | None, events: Sequence[dict[str, Any]]) -> int | None:
    """Return the optimizer steps of the complete run; None if its configuration or its domains' sizes are unknown."""
    if config is None:
        return None
    tokens: dict[str, int] = next((event["mixture"]["train_tokens"] for event in events if "mixture" in event), {})
    if not tokens and config.stop.data_once:
        return None
    length = config.data.sequence_length
    samples = sum(count // length for name, count in tokens.items() if name not in config.mixture.exclude)
    return total_steps(config, samples)


def duration(seconds: float) -> str:
    """Return a time as text in its two largest units, such as `3 h 05 min`; below two minutes in whole seconds."""
    rounded = round(seconds)
    if rounded < 120:
        return f"{rounded} s"
    if rounded < 7200:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    hours, minutes = rounded // 3600, rounded % 3600 // 60
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


def _patience(records: Sequence[dict[str, Any]]) -> float:
    def last(kinds: tuple[str, ...], key: str) -> float:
        clocks = (record["clock"] for record in reversed(records) if record["kind"] in kinds)
        clock: dict[str, float] = next(clocks, {})
        return clock.get(key, 0.0)

    step_s, measure_s = last(("step",), "step_s"), last(("interval", "end"), "measure_s")
    return max(_PATIENCE_S, _PATIENCE_STEPS * step_s, _PATIENCE_MEASUREMENTS * measure_s)


def _last_sign(run_dir: Path) -> float:
    names = ("ledger.jsonl", "events.jsonl", "stacks/rank-0.txt", "run.json")
    times = [(run_dir / name).stat().st_mtime for name in names if (run_dir / name).is_file()]
    return max(times, default=0.0)


def _stacks(path: Path) -> str:
    """Return the phase and stacks that a rank's watchdog wrote to `path`, or an empty text if no file is there."""
    return path.read_text(errors="replace") if path.is_file() else ""
