"""Pictures by domain: perplexities (the paper's Figure 1), ratios over tokens (Figure 3), mixture, tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ddk_ds.drawing import (
    Array,
    Picture,
    bar_style,
    count_unit,
    describe_bins,
    draw_curve,
    envelope,
    legend_above,
    line_style,
    log_if_wide,
    marker,
    tidy,
    to_svg,
)
from ddk_ds.report.happenings import describe_marks, draw_marks, step_axis
from ddk_ds.report.records import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BEFORE: dict[str, Any] = {"color": "white", "hatch": "", "edgecolor": "black"}
_TEACHER: dict[str, Any] = {"color": "#BBBBBB", "hatch": "", "edgecolor": "black"}
_BAR_INCHES = 0.125
_WORD: dict[str, Any] = {"textcoords": "offset points", "ha": "left", "va": "top", "fontsize": 8}


def perplexity_bars(runs: Sequence[RunRecord]) -> Picture:
    """Draw Figure 1: the student before and after training, the other runs' students, the teacher."""
    run = runs[0]
    domains = run.domains
    series: list[tuple[str, dict[str, Any], dict[str, float | None]]] = [
        ("student before", _BEFORE, {result.name: result.before for result in run.results})
    ]
    for number, other in enumerate(runs):
        when = "after" if other.summary is not None else f"at step {other.measurements[-1]['step']:,}"
        label = f"student {when}" if len(runs) == 1 else f"{other.name} {when}"
        series.append((label, bar_style(number), {result.name: result.after for result in other.results}))
    if run.has_teacher:
        series.append(("teacher", _TEACHER, {result.name: result.teacher_ppl for result in run.results}))
    values = np.array([[_value(by_domain.get(name)) for name in domains] for _, _, by_domain in series])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        thick = 0.84 / len(series)
        for number, (label, style, _) in enumerate(series):
            places = np.arange(len(domains)) - 0.42 + thick * (number + 0.5)
            axes.barh(places, values[number], thick, label=label, linewidth=0.5, **style)
        axes.set_yticks(range(len(domains)), domains)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        wide = log_if_wide(axes, values.ravel(), "x")
        axes.set_xlabel(f"perplexity on held-out text (per token){', logarithmic' if wide else ''}")
        legend_above(axes, columns=2)
        tidy(axes, "x")

    shown = "; ".join(
        f"{name}: " + ", ".join(f"{label} {values[i, place]:.3g}" for i, (label, _, _) in enumerate(series))
        for place, name in enumerate(domains)
    )
    height = 1.0 + 0.12 * len(series) + len(domains) * max(0.3, _BAR_INCHES * len(series) + 0.06)
    caption = "Lower is better. All are measured on the same held-out samples. As Figure 1 of arXiv 2407.16154."
    title = "Perplexity by domain"
    return Picture("perplexity", title, to_svg(draw, height), f"Bars of perplexity by domain. {shown}.", caption)


def _value(value: float | None) -> float:
    return np.nan if value is None else value


def over_tokens(run: RunRecord, top: float | None, title: str = "") -> Picture:
    """Draw Figure 3: each domain's ratio to the teacher over tokens; without a teacher the student's perplexity.

    `top` is the greatest ratio of all runs on the page, which makes their axes equal; None for a single run.
    """
    values = run.by_domain("ratio" if run.has_teacher else "student_ppl")
    tokens = run.by_domain("domain_tokens").sum(1)
    by, word = count_unit(float(tokens[-1]))
    quantity = "perplexity, student / teacher" if run.has_teacher else "perplexity (per token)"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, name in enumerate(run.domains):
            draw_curve(axes, tokens / by, values[:, number], name, line_style(number), marker(number))
        if run.has_teacher:
            axes.axhline(1, color="black", linewidth=0.8)
            low, high = float(np.nanmin(values)), float(np.nanmax(values))
            axes.set_ylim(min(low, 1.0) - 0.12 * (high - min(low, 1.0)))  # room for the word below the line
            axes.annotate("teacher", (0, 1), (4, -2), xycoords=("axes fraction", "data"), **_WORD)
        shown = values.ravel() if top is None else np.append(values.ravel(), top)
        log_if_wide(axes, np.append(shown, 1.0) if run.has_teacher else shown)
        if axes.get_yscale() == "linear" and top is not None:
            axes.set_ylim(top=top * 1.05)
        axes.set_xlim(0, max(1.0, 1.02 * tokens[-1] / by))
        axes.set_xlabel(f"{word}tokens trained on")
        axes.set_ylabel(quantity)
        legend_above(axes)
        tidy(axes)

    ends = ", ".join(f"{name} {values[0, i]:.3g} to {values[-1, i]:.3g}" for i, name in enumerate(run.domains))
    kind = "Ratio of perplexities" if run.has_teacher else "Perplexity"
    caption = "Measured between intervals on held-out samples." + describe_bins(len(values), "measurements")
    if run.has_teacher:
        caption = "At 1 the student is as good as the teacher. As Figure 3 of arXiv 2407.16154. " + caption
    return Picture(
        f"ratio{_suffix(title)}" if run.has_teacher else f"perplexity_over_tokens{_suffix(title)}",
        f"{kind} by domain over tokens{title and f': {title}'}",
        to_svg(draw, 3.0 + 0.13 * len(run.domains) / 3),
        f"Lines of {kind.lower()} over {tokens[-1]:,.0f} tokens, first to last: {ends}.",
        caption,
    )


def mixture(run: RunRecord, title: str = "") -> Picture:
    """Draw the stacked proportions of the domains over the steps of the run."""
    intervals = run.intervals
    shares = run.by_domain("proportions", intervals)
    starts = np.array([record["step"] for record in intervals], np.float64)
    binned = [envelope(starts, column) for column in shares.T]
    lower = np.array([series.mean for series in binned])
    edges = starts if binned[0].per_bin == 1 else np.append(starts[0], binned[0].x[:-1])
    edges = np.append(edges, max(run.last_step, edges[-1] + 1))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bottom = np.zeros(len(edges))
        for number, name in enumerate(run.domains):
            top = bottom + np.append(lower[number], lower[number, -1])
            style: dict[str, Any] = {"facecolor": bar_style(number)["color"], "hatch": bar_style(number)["hatch"]}
            axes.fill_between(edges, bottom, top, step="post", label=name, edgecolor="black", linewidth=0.3, **style)
            bottom = top
        _step_axis(axes, run)
        axes.set_ylim(0, 1)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylabel("share of the samples")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        legend_above(axes)

    ends = ", ".join(f"{name} {shares[0, i]:.1%} to {shares[-1, i]:.1%}" for i, name in enumerate(run.domains))
    caption = "Proportions that the controller decided for each interval." + describe_marks(run)
    if binned[0].per_bin > 1:
        caption += f" Means over {binned[0].per_bin:,} intervals each."
    return Picture(
        f"mixture{_suffix(title)}",
        f"Mixture over time{title and f': {title}'}",
        to_svg(draw, 3.0 + 0.13 * len(run.domains) / 3),
        f"Stacked shares of the samples by domain, first to last interval: {ends}.",
        caption,
    )


def _suffix(title: str) -> str:
    return "_" + re.sub(r"[^\w.-]+", "_", title).strip("_") if title else ""


def _step_axis(axes: Axes, run: RunRecord) -> None:
    draw_marks(axes, run)
    step_axis(axes)


def asked_and_realised(run: RunRecord) -> tuple[Array, Array]:
    """Return two shares (N,) of all tokens so far: asked for by the intervals' proportions, and drawn."""
    intervals = run.intervals
    totals = run.by_domain("domain_tokens").sum(1)
    totals = np.append(totals[: len(intervals)], run.domain_tokens.sum())
    drawn = run.domain_tokens - run.by_domain("domain_tokens")[0]
    weights = np.diff(totals)
    tokens = max(1.0, weights.sum())
    return weights @ run.by_domain("proportions", intervals) / tokens, drawn / tokens


def domain_token_bars(run: RunRecord) -> Picture:
    """Draw two bars for each domain: the share of tokens that the proportions asked for, and the share drawn."""
    asked, drawn = asked_and_realised(run)
    by_rows = (("by the proportions", _BEFORE, asked), ("tokens drawn", bar_style(0), drawn))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (label, style, shares) in enumerate(by_rows):
            places = np.arange(len(run.domains)) - 0.2 + 0.4 * number
            bars = axes.barh(places, 100 * shares, 0.38, label=label, linewidth=0.5, **style)
            axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=2, fontsize=7)
        axes.set_yticks(range(len(run.domains)), run.domains)
        axes.invert_yaxis()
        axes.margins(x=0.12, y=0.02)
        axes.set_xlabel("share of the run's tokens, %")
        legend_above(axes, columns=2)
        tidy(axes, "x")

    shown = "; ".join(f"{n}: asked {a:.1%}, drawn {d:.1%}" for n, a, d in zip(run.domains, asked, drawn, strict=True))
    caption = (
        "White: the intervals' proportions, weighted by their tokens. Drawn tokens differ by rounding to whole "
        "samples, by padding, and where a domain is at its cap."
    )
    height = 1.1 + 0.36 * len(run.domains)
    return Picture("tokens", "Tokens by domain", to_svg(draw, height), f"Bars of token shares. {shown}.", caption)
