"""Events of a run: marks on the axis of steps, the table of events, and the run's progress over time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from ddk_ds.drawing import Picture, legend_above, tidy, time_unit, to_svg
from ddk_ds.report.records import RunRecord
from ddk_ds.report.run_progress import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS_ACROSS = 120


@dataclass(frozen=True)
class _Kind:
    label: str
    events: tuple[str, ...]
    colour: str
    marker: str
    line: Any


_BEGINNINGS = ("start", "resume", "fork")
_KINDS = (
    _Kind("restart", _BEGINNINGS, "#444444", ">", "--"),
    _Kind("alarm", ("alarm", "warning"), "#D55E00", "v", ":"),
    _Kind("fault", ("roll_back", "stopped", "checkpoint_failed", "damaged", "skipped"), "#CC79A7", "X", "-."),
)


def marked_events(run: RunRecord) -> list[tuple[_Kind, list[float]]]:
    """Return each kind of mark with the steps at which it happened; the run's first start, or fork, has no mark."""
    marks = []
    for kind in _KINDS:
        steps = [
            float(event.get("step", 0))
            for number, event in enumerate(run.events)
            if event["event"] in kind.events and not (number == 0 and event["event"] in _BEGINNINGS)
        ]
        if steps:
            marks.append((kind, steps))
    return marks


def draw_marks(axes: Axes, run: RunRecord) -> None:
    """Draw vertical lines at the steps of restarts, alarms and faults; the x axis must count steps."""
    for kind, steps in marked_events(run):
        width = max(1.0, run.last_step / _MARKS_ACROSS)
        places = sorted({round(step / width) * width if width > 1 else step for step in steps})
        for place in places:
            axes.axvline(place, color=kind.colour, linestyle=kind.line, linewidth=0.8, alpha=0.7, zorder=1)
        top = axes.get_xaxis_transform()
        options: dict[str, Any] = {"clip_on": False, "markersize": 5, "linestyle": ""}
        axes.plot(
            places, [1.0] * len(places), kind.marker, color=kind.colour, transform=top, label=kind.label, **options
        )


def step_axis(axes: Axes) -> None:
    """Label the x axis as optimizer steps, with whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("optimizer step")


def describe_marks(run: RunRecord) -> str:
    """Return the sentence of a caption that explains the marks, or an empty text without marks."""
    counts = [f"{len(steps)} {kind.label}{'s' if len(steps) > 1 else ''}" for kind, steps in marked_events(run)]
    return f" Vertical lines: {', '.join(counts)}." if counts else ""


def progress_picture(run: RunRecord) -> Picture | None:
    """Draw the run's optimizer step over wall time with its restarts and faults, or return None without events."""
    points = [(event["time_s"], float(event.get("step", 0)), event["event"]) for event in run.events]
    if not points:
        return None
    began = points[0][0]
    end_s = max(points[-1][0], time.time() - run.state.age_s) if run.state.kind == "running" else points[-1][0]
    by, unit = time_unit(end_s - began)
    pieces: list[list[tuple[float, float]]] = []
    for when, step, event in points:
        if event in _BEGINNINGS or not pieces:
            pieces.append([])
        pieces[-1].append(((when - began) / by, step))
    if run.state.kind == "running":
        pieces[-1].append(((end_s - began) / by, float(run.last_step)))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, piece in enumerate(pieces):
            label = "one start of the run" if number == 0 else None
            axes.plot(*zip(*piece, strict=True), color="#0072B2", linewidth=1.3, label=label)
            if number:
                gap = (pieces[number - 1][-1], piece[0])
                axes.plot(*zip(*gap, strict=True), color="#444444", linestyle=":", linewidth=1)
        saved = [((when - began) / by, step) for when, step, event in points if event == "checkpoint"]
        if saved:
            axes.plot(*zip(*saved, strict=True), "|", color="#009E73", markersize=8, label="checkpoint")
        for kind in _KINDS:
            places = [((when - began) / by, step) for when, step, event in points[1:] if event in kind.events]
            if places:
                axes.plot(*zip(*places, strict=True), kind.marker, color=kind.colour, label=kind.label, markersize=6)
        axes.set_xlabel(f"time since the run's first start, {unit}")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylabel("optimizer step")
        axes.set_ylim(bottom=0)
        legend_above(axes)
        tidy(axes)

    starts = len(pieces)
    alt = f"Optimizer step over time: {run.last_step:,} steps in {duration(end_s - began)}, {starts} starts."
    caption = (
        "Steps as the events record them. Dotted lines go from the last event of a start to the next start; steps "
        "after the checkpoint that it continued from were done again."
    )
    return Picture("progress", "Progress and restarts", to_svg(draw), alt, caption)


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
