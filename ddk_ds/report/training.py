"""Pictures of the training itself: loss, gradient, learning rate, speed, where the time went, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ddk_ds.drawing import (
    Array,
    Picture,
    bar_style,
    draw_curve,
    envelope,
    legend_above,
    line_style,
    log_if_wide,
    thinned,
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
    """Loss, gradient norm and learning rate; none before the first step."""
    if not len(run.steps.step):
        return []
    columns = run.steps.columns
    losses = {"loss": columns["loss"], "cross-entropy (CE)": columns["ce"], "divergence (KL)": columns["kl"]}
    if not run.has_teacher:
        losses = {"cross-entropy, the whole loss": columns["loss"]}
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
            "What each step used.",
            from_zero=True,
        ),
    ]


def speed_pictures(run: RunRecord) -> list[Picture]:
    """Throughput, the parts of a step, the run's time in all, memory; none before the first step."""
    if not len(run.steps.step):
        return []
    columns = run.steps.columns
    speed = {"tokens/s": columns["tokens_per_s"]}
    memory = {"peak": columns["peak_memory_gb"]}
    said = "Most that rank 0 held in a step: of the GPU's memory, or of the host's where that computes."
    by_part = {PARTS.get(f"{name}_s", name): size for name, size in run.steps.peaks_gb.items()}
    if by_part:
        said += " By part: " + ", ".join(f"{name} {size:.2f} GB" for name, size in by_part.items()) + "."
    return [
        _curve(run, "speed", "Throughput", speed, "tokens/s", "Targets of the loss, all ranks.", from_zero=True),
        step_parts(run),
        time_spent(run),
        _curve(run, "memory", "Peak memory", memory, "GB (10^9 bytes)", said, from_zero=True),
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
    caption += thinned(len(run.steps.step), "steps") + describe_marks(run)
    alt = f"{title} over {len(run.steps.step):,} steps. {shown}."
    return Picture(name, title, to_svg(draw, 2.9), alt, caption)


def _first_to_last(values: Array) -> str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "no finite value"
    return f"from {finite[0]:.4g} to {finite[-1]:.4g}, between {finite.min():.4g} and {finite.max():.4g}"


def parts_of_steps(run: RunRecord) -> dict[str, Array]:
    """(S,) seconds of each part of a step that the ledger has, and of what they leave."""
    columns = run.steps.columns
    parts = {word: np.nan_to_num(columns[key]) for key, word in PARTS.items() if np.isfinite(columns[key]).any()}
    rest = np.nan_to_num(columns["step_s"]) - sum(parts.values(), np.zeros(len(columns["step_s"])))
    return {**parts, _OTHER: np.maximum(rest, 0.0)}


def step_parts(run: RunRecord) -> Picture:
    """The seconds of a step by part, stacked, over the run."""
    parts = parts_of_steps(run)
    binned = {word: envelope(run.steps.step, seconds) for word, seconds in parts.items()}
    x = next(iter(binned.values())).x
    if len(x) == 1:
        x = np.array([x[0] - 1, x[0]])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bottom = np.zeros(len(x))
        for number, (word, found) in enumerate(binned.items()):
            top = bottom + found.mean
            style: dict[str, Any] = {"facecolor": bar_style(number)["color"], "hatch": bar_style(number)["hatch"]}
            axes.fill_between(x, bottom, top, label=word, edgecolor="black", linewidth=0.2, **style)
            bottom = top
        draw_marks(axes, run)
        # One slow step must not press all others flat.
        axes.set_ylim(0, 1.25 * float(np.percentile(bottom, 99)) or 1.0)
        axes.set_xlim(x[0], x[-1])
        step_axis(axes)
        axes.set_ylabel("seconds a step")
        legend_above(axes)
        tidy(axes)

    whole = sum(float(seconds.sum()) for seconds in parts.values()) or 1.0
    shown = ", ".join(f"{word} {seconds.sum() / whole:.1%}" for word, seconds in parts.items())
    per_bin = next(iter(binned.values())).per_bin
    caption = "Rank 0's. The axis ends at 1.25 times the 99th percentile." + describe_marks(run)
    if per_bin > 1:
        caption += f" Means over bins of {per_bin:,} steps; Throughput shows least and greatest."
    return Picture("step_parts", "Parts of a step", to_svg(draw, 4.0), f"Stacked seconds a step: {shown}.", caption)


def spent(run: RunRecord) -> dict[str, float]:
    """Seconds of the run by what they went to: the parts of steps, and what stands between steps."""
    clocks = [record.get("clock", {}) for record in run.measurements]
    found = {word: float(seconds.sum()) for word, seconds in parts_of_steps(run).items()}
    found["measurement"] = sum(clock.get("measure_s", 0.0) for clock in clocks)
    found["controller"] = sum(clock.get("controller_s", 0.0) for clock in clocks)
    found["checkpoint pause"] = checkpoint_seconds(run)[1]
    found["monitoring"] = float(np.nansum(run.steps.columns["monitor_s"]))
    return found


def time_spent(run: RunRecord) -> Picture:
    """Where the run's time went, in all."""
    found = spent(run)
    whole = sum(found.values()) or 1.0
    by, unit = time_unit(max(found.values()))
    saved, _, writing_s = checkpoint_seconds(run)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (word, seconds) in enumerate(found.items()):
            bars = axes.barh(word, seconds / by, linewidth=0.5, **bar_style(number))
            axes.bar_label(bars, [f"{duration_or_ms(seconds)}, {seconds / whole:.1%}"], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.32, y=0.02)
        axes.set_xlabel(f"{unit} in all")
        tidy(axes, "x")

    shown = "; ".join(f"{word} {duration_or_ms(seconds)}" for word, seconds in found.items())
    caption = (
        "The upper ones are parts of steps, the lower four stand between them. Of the lines that ledger.jsonl holds: "
        "work that a restart threw away is not in it, but its checkpoints are."
    )
    if saved:
        caption += f" {saved:,} checkpoints took {duration_or_ms(writing_s)} to write, beside the training."
    height = 0.8 + 0.25 * len(found)
    return Picture("time", "Where the time went", to_svg(draw, height), f"Bars of time: {shown}.", caption)


def duration_or_ms(seconds: float) -> str:
    """A duration, also a short one."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 120 else duration(seconds)
