"""Pictures of the training over its steps: loss, gradient norm, learning rate, speed, time by part, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ddk_ds.drawing import (
    Array,
    Picture,
    bar_style,
    describe_bins,
    draw_curve,
    envelope,
    legend_above,
    line_style,
    log_if_wide,
    tidy,
    time_unit,
    to_svg,
)
from ddk_ds.report.happenings import checkpoint_seconds, describe_marks, draw_marks, step_axis
from ddk_ds.report.records import PARTS, RunRecord
from ddk_ds.report.run_progress import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OTHER = "other"


def training_pictures(run: RunRecord) -> list[Picture]:
    """Draw loss, gradient norm and learning rate; empty before the first step."""
    if not len(run.steps.step):
        return []
    columns = run.steps.columns
    losses = {"loss": columns["loss"], "cross-entropy (CE)": columns["ce"], "divergence (KL)": columns["kl"]}
    if not run.has_teacher:
        losses = {"cross-entropy, the only loss": columns["loss"]}
    unit = "nats a token"
    return [
        _curve(run, "loss", "Loss", losses, unit, "Means over all targets of a step."),
        _curve(
            run,
            "grad_norm",
            "Gradient norm",
            {"gradient norm": columns["grad_norm"]},
            "global L2 norm (no unit)",
            "Before clipping.",
            wide=True,
        ),
        _curve(
            run,
            "learning_rate",
            "Learning rate",
            {"learning rate": columns["learning_rate"]},
            "learning rate (no unit)",
            "The rate that each step used.",
            from_zero=True,
        ),
    ]


def speed_pictures(run: RunRecord) -> list[Picture]:
    """Draw throughput, the parts of a step, the run's time by part, and memory; empty before the first step."""
    if not len(run.steps.step):
        return []
    columns = run.steps.columns
    speed = {"tokens/s": columns["tokens_per_s"]}
    memory = {"peak": columns["peak_memory_gb"]}
    caption = "Peak of rank 0 in a step: memory of the GPU, or of the host where the CPU computes."
    by_part = {PARTS.get(f"{name}_s", name): size for name, size in run.steps.peaks_gb.items()}
    if by_part:
        caption += " By part: " + ", ".join(f"{name} {size:.2f} GB" for name, size in by_part.items()) + "."
    return [
        _curve(run, "speed", "Throughput", speed, "tokens/s", "Targets of the loss, all ranks.", from_zero=True),
        step_parts_picture(run),
        time_picture(run),
        _curve(run, "memory", "Peak memory", memory, "GB (10^9 bytes)", caption, from_zero=True),
    ]


def _curve(
    run: RunRecord,
    name: str,
    title: str,
    series: dict[str, Array],
    unit: str,
    caption: str,
    *,
    from_zero: bool = False,
    wide: bool = False,
) -> Picture:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (label, values) in enumerate(series.items()):
            draw_curve(axes, run.steps.step, values, label if len(series) > 1 else "", line_style(number), "o")
        draw_marks(axes, run)
        if wide:
            log_if_wide(axes, next(iter(series.values())))
        if from_zero:
            axes.set_ylim(bottom=0)
        step_axis(axes)
        axes.set_ylabel(unit)
        legend_above(axes)
        tidy(axes)

    shown = "; ".join(f"{label}: {_first_to_last(values)}" for label, values in series.items())
    caption += describe_bins(len(run.steps.step), "steps") + describe_marks(run)
    alt = f"{title} over {len(run.steps.step):,} steps. {shown}."
    return Picture(name, title, to_svg(draw, 2.9), alt, caption)


def _first_to_last(values: Array) -> str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "no finite value"
    return f"from {finite[0]:.4g} to {finite[-1]:.4g}, between {finite.min():.4g} and {finite.max():.4g}"


def step_seconds_by_part(run: RunRecord) -> dict[str, Array]:
    """Return the seconds (S,) in each of S steps by part that the ledger records; "other" holds the remainder."""
    columns = run.steps.columns
    parts = {word: np.nan_to_num(columns[key]) for key, word in PARTS.items() if np.isfinite(columns[key]).any()}
    rest = np.nan_to_num(columns["step_s"]) - sum(parts.values(), np.zeros(len(columns["step_s"])))
    return {**parts, _OTHER: np.maximum(rest, 0.0)}


def step_parts_picture(run: RunRecord) -> Picture:
    """Draw the seconds of each part of a step as stacked areas over the steps of the run."""
    parts = step_seconds_by_part(run)
    binned = {word: envelope(run.steps.step, seconds) for word, seconds in parts.items()}
    x = next(iter(binned.values())).x
    if len(x) == 1:
        x = np.array([x[0] - 1, x[0]])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bottom = np.zeros(len(x))
        for number, (word, seconds) in enumerate(binned.items()):
            top = bottom + seconds.mean
            style: dict[str, Any] = {"facecolor": bar_style(number)["color"], "hatch": bar_style(number)["hatch"]}
            axes.fill_between(x, bottom, top, label=word, edgecolor="black", linewidth=0.2, **style)
            bottom = top
        draw_marks(axes, run)
        # One slow step must not flatten all others.
        axes.set_ylim(0, 1.25 * float(np.percentile(bottom, 99)) or 1.0)
        axes.set_xlim(x[0], x[-1])
        step_axis(axes)
        axes.set_ylabel("seconds a step")
        legend_above(axes)
        tidy(axes)

    total_s = sum(float(seconds.sum()) for seconds in parts.values()) or 1.0
    shown = ", ".join(f"{word} {seconds.sum() / total_s:.1%}" for word, seconds in parts.items())
    per_bin = next(iter(binned.values())).per_bin
    caption = "Measured on rank 0. The axis ends at 1.25 times the 99th percentile." + describe_marks(run)
    if per_bin > 1:
        caption += f" Means over bins of {per_bin:,} steps; Throughput shows the extremes."
    return Picture("step_parts", "Parts of a step", to_svg(draw, 4.0), f"Stacked seconds a step: {shown}.", caption)


def seconds_by_part(run: RunRecord) -> dict[str, float]:
    """Return the run's total seconds by part: each part of the steps, and all work between steps."""
    clocks = [record.get("clock", {}) for record in run.measurements]
    by_part = {word: float(seconds.sum()) for word, seconds in step_seconds_by_part(run).items()}
    by_part["measurement"] = sum(clock.get("measure_s", 0.0) for clock in clocks)
    by_part["controller"] = sum(clock.get("controller_s", 0.0) for clock in clocks)
    by_part["checkpoint pause"] = checkpoint_seconds(run)[1]
    by_part["monitoring"] = float(np.nansum(run.steps.columns["monitor_s"]))
    return by_part


def time_picture(run: RunRecord) -> Picture:
    """Draw a bar for each part of the run's time, with its total and its share."""
    by_part = seconds_by_part(run)
    total_s = sum(by_part.values()) or 1.0
    by, unit = time_unit(max(by_part.values()))
    saved, _, writing_s = checkpoint_seconds(run)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (word, seconds) in enumerate(by_part.items()):
            bars = axes.barh(word, seconds / by, linewidth=0.5, **bar_style(number))
            axes.bar_label(bars, [f"{duration_or_ms(seconds)}, {seconds / total_s:.1%}"], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.32, y=0.02)
        axes.set_xlabel(f"{unit}, total")
        tidy(axes, "x")

    shown = "; ".join(f"{word} {duration_or_ms(seconds)}" for word, seconds in by_part.items())
    caption = (
        "The upper bars are parts of steps, the lower four lie between steps. Work that a restart discarded is not "
        "counted, except its checkpoints."
    )
    if saved:
        caption += f" {saved:,} checkpoints took {duration_or_ms(writing_s)} to write while training went on."
    height = 0.8 + 0.25 * len(by_part)
    return Picture("time", "Where the time went", to_svg(draw, height), f"Bars of time: {shown}.", caption)


def duration_or_ms(seconds: float) -> str:
    """Return a time as text: in ms below a second, in seconds with one decimal below two minutes, else `duration`."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 120 else duration(seconds)
