"""Events of a run: marks on the axis of steps, the table of events, and the run's progress over time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddk_ds.drawing import time_unit
from ddk_ds.report.charts import Chart, Curve, Mark, Panel
from ddk_ds.report.groups import Group
from ddk_ds.report.records import RunRecord
from ddk_ds.run_files import UNREADABLE

_KINDS = {
    "restart": ("start", "resume", "fork", "phase"),
    "alarm": ("alarm", "warning"),
    "fault": ("roll_back", "stopped", "checkpoint_failed", "damaged", "skipped", UNREADABLE),
}
_MARKS_ACROSS = 120


def marks(run: RunRecord) -> list[Mark]:
    """Return the run's restarts, alarms and faults; its first start, or fork, is none of them."""
    return [
        Mark(float(event.get("step", 0)), kind, f"{run.name}: {_in_words(event)}")
        for kind, names in _KINDS.items()
        for number, event in enumerate(run.events)
        if event["event"] in names and not (number == 0 and event["event"] in _KINDS["restart"])
    ]


def thinned(found: Sequence[Mark], last_step: float) -> list[Mark]:
    """Return the marks with at most _MARKS_ACROSS places for each kind: several at one place become one."""
    width = max(1.0, last_step / _MARKS_ACROSS)
    places: dict[tuple[str, int], list[Mark]] = {}
    for mark in found:
        places.setdefault((mark.kind, round(mark.step / width)), []).append(mark)
    return [
        Mark(alike[0].step, kind, alike[0].text if len(alike) == 1 else f"{alike[0].text}; and {len(alike) - 1} more")
        for (kind, _), alike in places.items()
    ]


def describe_marks(groups: Sequence[Group]) -> str:
    """Return the sentence of a caption that explains the marks, or an empty text without marks."""
    kinds = [mark.kind for group in groups for run in group.runs for mark in marks(run)]
    counts = [f"{kinds.count(kind)} {kind}{'s' if kinds.count(kind) > 1 else ''}" for kind in _KINDS if kind in kinds]
    return f" Vertical lines: {', '.join(counts)}." if counts else ""


def _in_words(event: dict[str, Any]) -> str:
    text = event.get("text") or event.get("reason") or event.get("path") or ""
    return f"{event['event']} at step {event.get('step', 0):,}{text and f': {text}'}"


def progress(groups: Sequence[Group]) -> Chart | None:
    """Return each run's optimizer step over wall time since its own first start; None without events."""
    runs = [(group, run) for group in groups for run in group.runs if run.events]
    if not runs:
        return None
    by, unit = time_unit(max(_end_s(run) - run.events[0]["time_s"] for _, run in runs))
    curves = []
    for group, run in runs:
        seconds, steps = _steps_over_time(run)
        label = group.label if len(group.runs) == 1 else run.name
        curves.append(Curve(label, group.key, group.number, seconds / by, steps))
    caption = (
        "Steps as the events record them, from each run's first start. Where a line goes down, the run continued from "
        "an earlier checkpoint and did the steps after it again."
    )
    label = f"time since the run's first start, {unit}"
    return Chart(
        "progress",
        "Progress and restarts",
        [Panel("", curves)],
        label,
        "optimizer step",
        caption,
        steps=False,
        y_format="count",
        from_zero=True,
    )


def _end_s(run: RunRecord) -> float:
    last = float(run.events[-1]["time_s"])
    return max(last, time.time() - run.state.age_s) if run.state.kind == "running" else last


def _steps_over_time(run: RunRecord) -> tuple[Any, Any]:
    """Return seconds and steps (P,) of the run's events; a start has the step that it continued from."""
    began = run.events[0]["time_s"]
    points = [(event["time_s"] - began, float(event.get("step", 0))) for event in run.events]
    if run.state.kind == "running":
        points.append((_end_s(run) - began, float(run.last_step)))
    seconds, steps = zip(*points, strict=True)
    return np.array(seconds, np.float64), np.array(steps, np.float64)


def event_rows(events: Sequence[dict[str, Any]], limit: int) -> list[tuple[str, str, str, str]]:
    """Return time (UTC), event, step and details of the last `limit` events that are not checkpoints."""
    shown = [event for event in events if event["event"] != "checkpoint"][-limit:]
    rows = []
    for event in shown:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["time_s"]))
        left_out = ("event", "time_s", "step", "mixture", "versions")
        rest = "; ".join(
            f"{key}: {_value_text(value)}" for key, value in event.items() if key not in left_out and value != {}
        )
        rows.append((when, event["event"], str(event.get("step", "")), rest))
    return rows


def _value_text(value: Any) -> str:
    return ", ".join(f"{key} {change}" for key, change in value.items()) if isinstance(value, dict) else str(value)


def checkpoint_seconds(run: RunRecord) -> tuple[int, float, float]:
    """Return the number of checkpoints and two sums: seconds that training waited, and seconds of writing."""
    saved = [event for event in run.events if event["event"] == "checkpoint"]
    pauses = np.array([event.get("pause_s", 0.0) for event in saved], np.float64)
    writing = np.array([event.get("seconds", 0.0) for event in saved], np.float64)
    return len(saved), float(pauses.sum()), float(writing.sum())
