"""Pictures of the training over its steps: loss, gradient norm, learning rate, speed, time by part, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ddk_ds.drawing import Array, time_unit
from ddk_ds.report.charts import (
    AnyChart,
    Chart,
    DotChart,
    Dots,
    Panel,
    describe_curve,
    mean_curve,
    step_curve,
)
from ddk_ds.report.groups import Group
from ddk_ds.report.happenings import checkpoint_seconds, describe_marks, marks
from ddk_ds.report.records import PARTS, RunRecord
from ddk_ds.report.run_progress import duration

_OTHER = "other"
_NATS = "nats a token"


def training_charts(groups: Sequence[Group]) -> list[AnyChart]:
    """Return the losses, gradient norm and learning rate of every run; empty before the first step."""
    groups = _begun(groups)
    if not groups:
        return []
    with_teacher = [group for group in groups if group.first.has_teacher]
    charts: list[AnyChart] = [
        _by_run(groups, "loss", "Loss", "loss", _NATS, _about_losses(groups), smooth=True),
    ]
    if with_teacher:
        charts.append(_by_run(groups, "ce", "Cross-entropy (CE)", "ce", _NATS, "On the next token.", smooth=True))
        text = "Of the student's distribution to the teacher's, as the method takes it."
        charts.append(_by_run(with_teacher, "kl", "Divergence (KL)", "kl", _NATS, text, smooth=True))
    norm = "global L2 norm (no unit)"
    charts.append(
        _by_run(groups, "grad_norm", "Gradient norm", "grad_norm", norm, "Before clipping.", smooth=True, wide=True)
    )
    rate = "learning rate (no unit)"
    text = "The rate that each step used."
    charts.append(
        _by_run(groups, "learning_rate", "Learning rate", "learning_rate", rate, text, from_zero=True, y_format="small")
    )
    return charts


def about_steps(groups: Sequence[Group]) -> str:
    """Return what is true of all pictures over steps: smoothing, bins, marks. Empty before the first step."""
    longest = max(len(run.steps.step) for group in groups for run in group.runs)
    return (describe_curve(longest) + describe_marks(groups)).strip()


def _begun(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if any(len(run.steps.step) for run in group.runs)]


def _about_losses(groups: Sequence[Group]) -> str:
    text = "Mean over all targets of a step."
    if len({_loss_of(group.first) for group in groups}) > 1:
        text += " These runs do not minimise the same loss: compare their perplexities, not this."
    return text


def _loss_of(run: RunRecord) -> str:
    """Return a text that is equal for runs that minimise the same loss."""
    if run.config is None:
        return str(run.run_dir)
    preset = replace(run.config.preset, description="", controller="")
    return f"{preset} {run.config.loss}"


def speed_charts(groups: Sequence[Group]) -> list[AnyChart]:
    """Return throughput, parts of a step, time by part and memory of every run; empty before the first step."""
    groups = _begun(groups)
    if not groups:
        return []
    memory = "Peak of rank 0 in a step: memory of the GPU, or of the host where the CPU computes."
    if len(groups) == 1:
        peaks = groups[0].first.steps.peaks_gb
        by_part = [f"{PARTS.get(f'{name}_s', name)} {size:.2f} GB" for name, size in peaks.items()]
        memory += f" By part: {', '.join(by_part)}." if by_part else ""
    speed = "Targets of the loss, all ranks."
    return [
        _by_run(
            groups,
            "speed",
            "Throughput",
            "tokens_per_s",
            "tokens/s",
            speed,
            smooth=True,
            from_zero=True,
            y_format="count",
        ),
        _by_run(groups, "memory", "Peak memory", "peak_memory_gb", "GB (10^9 bytes)", memory, from_zero=True),
        step_parts(groups),
        time_dots(groups),
    ]


def _by_run(
    groups: Sequence[Group],
    name: str,
    title: str,
    column: str,
    unit: str,
    caption: str,
    *,
    smooth: bool = False,
    wide: bool = False,
    **look: Any,
) -> Chart:
    curves = []
    for group in groups:
        for run in group.runs:
            values, label = run.steps.columns[column], group.label if len(group.runs) == 1 else run.name
            curves.append(step_curve(label, group.key, group.number, run.steps.step, values, smooth=smooth))
    panel = Panel("", curves, [mark for group in groups for run in group.runs for mark in marks(run)])
    return Chart(name, title, [panel], "optimizer step", unit, caption, logarithmic=wide, **look)


def step_seconds_by_part(run: RunRecord) -> dict[str, Array]:
    """Return the seconds (S,) in each of S steps by part that the ledger records; "other" holds the remainder."""
    columns = run.steps.columns
    parts = {word: np.nan_to_num(columns[key]) for key, word in PARTS.items() if np.isfinite(columns[key]).any()}
    rest = np.nan_to_num(columns["step_s"]) - sum(parts.values(), np.zeros(len(columns["step_s"])))
    return {**parts, _OTHER: np.maximum(rest, 0.0)}


def step_parts(groups: Sequence[Group]) -> Chart:
    """Return the seconds of each part of a step over the steps, a panel for the first run of each group."""
    panels = []
    numbers = {word: number for number, word in enumerate([*PARTS.values(), _OTHER])}
    for group in groups:
        run = group.first
        curves = [
            mean_curve(word, f"part:{word}", numbers[word], run.steps.step, seconds)
            for word, seconds in step_seconds_by_part(run).items()
        ]
        panels.append(Panel(run.name if len(groups) > 1 else "", curves, marks(run)))
    caption = "Measured on rank 0; running means alone."
    if any(len(group.runs) > 1 for group in groups):
        caption += " Of several seeds the first."
    return Chart(
        "step_parts", "Parts of a step", panels, "optimizer step", "seconds", caption, from_zero=True, tall=True
    )


def seconds_by_part(run: RunRecord) -> dict[str, float]:
    """Return the run's total seconds by part: each part of the steps, and all work between steps."""
    clocks = [record.get("clock", {}) for record in run.measurements]
    by_part = {word: float(seconds.sum()) for word, seconds in step_seconds_by_part(run).items()}
    by_part["measurement"] = sum(clock.get("measure_s", 0.0) for clock in clocks)
    by_part["controller"] = sum(clock.get("controller_s", 0.0) for clock in clocks)
    by_part["checkpoint pause"] = checkpoint_seconds(run)[1]
    by_part["monitoring"] = float(np.nansum(run.steps.columns["monitor_s"]))
    return by_part


def time_dots(groups: Sequence[Group]) -> DotChart:
    """Return the total time of each part of the runs; of several seeds their mean."""
    by_group = [[seconds_by_part(run) for run in group.runs] for group in groups]
    parts = list(dict.fromkeys(part for by_run in by_group for by_part in by_run for part in by_part))
    means = [[np.mean([by_part.get(part, 0.0) for by_part in by_run]) for part in parts] for by_run in by_group]
    by, unit = time_unit(float(np.max(means)))
    series = [
        Dots("time" if len(groups) == 1 else group.title, group.key, group.number, np.array(seconds) / by)
        for group, seconds in zip(groups, means, strict=True)
    ]
    caption = (
        "The upper rows are parts of steps, the lower four lie between steps. Work that a restart discarded is not "
        "counted, except its checkpoints."
    )
    if len(groups) == 1:
        shown = sorted(zip(means[0], parts, strict=True), reverse=True)[:3]
        total_s = float(sum(means[0])) or 1.0
        caption += " Most: " + ", ".join(f"{word} {seconds / total_s:.1%}" for seconds, word in shown) + "."
        saved, _, writing_s = checkpoint_seconds(groups[0].first)
        if saved:
            caption += f" {saved:,} checkpoints took {duration_or_ms(writing_s)} to write while training went on."
    return DotChart("time", "Where the time went", parts, series, f"{unit}, total", caption, from_zero=True)


def duration_or_ms(seconds: float) -> str:
    """Return a time as text: in ms below a second, in seconds with one decimal below two minutes, else `duration`."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 120 else duration(seconds)
