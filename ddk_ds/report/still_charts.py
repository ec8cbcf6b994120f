"""The report's pictures as SVG by matplotlib: for paper, and for readers without JavaScript."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ddk_ds.drawing import legend_above, line_style, log_if_wide, marker, tidy, to_svg
from ddk_ds.report.charts import GREY, AnyChart, Chart, Curve, DotChart, Dots, Panel
from ddk_ds.report.happenings import thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARK_LINES: dict[str, Any] = {"restart": "--", "alarm": ":", "fault": "-."}
_SHAPES = {"dot": "o", "ring": "o", "tick": "|"}
_FEW = 24
_WITH_BANDS = 1
"""Curves of one picture up to which bands are drawn."""
_PANEL_INCHES = 2.2
_WORD: dict[str, Any] = {"textcoords": "offset points", "ha": "left", "va": "top", "fontsize": 8}


def still(chart: AnyChart) -> str:
    """Return the chart as SVG."""
    if isinstance(chart, DotChart):
        rows = len(chart.rows) * max(0.24, 0.13 * len(chart.series))
        return to_svg(lambda figure: _draw_dots(figure, chart), 1.0 + 0.07 * len(chart.series) + rows)
    legend = 0.07 * len({curve.key for curve in chart.curves})
    return to_svg(lambda figure: _draw_panels(figure, chart), 0.7 + legend + _PANEL_INCHES * len(chart.panels))


def _draw_panels(figure: Figure, chart: Chart) -> None:
    all_axes = figure.subplots(len(chart.panels), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, chart.panels, strict=True):
        _draw_panel(axes, chart, panel)
    values = np.concatenate([curve.y for curve in chart.curves])
    if chart.logarithmic:
        log_if_wide(all_axes[0], values if chart.level is None else np.append(values, chart.level[0]))
    if chart.from_zero:
        all_axes[0].set_ylim(bottom=0)
    formats: dict[str, Any] = {"share": lambda value, _: f"{value:.0%}", "count": "{x:,.0f}"}
    if chart.y_format in formats:
        all_axes[0].yaxis.set_major_formatter(formats[chart.y_format])
    if chart.steps:
        all_axes[0].xaxis.set_major_formatter("{x:,.0f}")
    all_axes[-1].set_xlabel(chart.x_label)
    legend_above(figure, _handles(*all_axes))


def _draw_panel(axes: Axes, chart: Chart, panel: Panel) -> None:
    many = len({curve.key for curve in chart.curves})
    for curve in panel.curves:
        _draw_curve(axes, curve, named=many > 1, alone=many <= _WITH_BANDS)
    last_step = max((float(curve.x[-1]) for curve in panel.curves if len(curve.x)), default=1.0)
    for mark in thinned(panel.marks, last_step):
        axes.axvline(mark.step, color=GREY, linestyle=_MARK_LINES[mark.kind], linewidth=0.8, zorder=1)
    if chart.level is not None:
        value, word = chart.level
        axes.axhline(value, color="black", linewidth=0.8)
        axes.annotate(word, (0, value), (4, -2), xycoords=("axes fraction", "data"), **_WORD)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_ylabel(chart.y_label)
    tidy(axes)


def _draw_curve(axes: Axes, curve: Curve, *, named: bool, alone: bool) -> None:
    """Draw a line; values behind it and bands only if there are few curves, which keeps the file small."""
    style = line_style(curve.number)
    if curve.low is not None and curve.high is not None and alone:
        axes.fill_between(curve.x, curve.low, curve.high, color=style["color"], alpha=0.2, linewidth=0)
    if curve.behind is not None and alone:
        axes.plot(curve.x, curve.behind, color=style["color"], alpha=0.35, linewidth=0.7)
    few = np.count_nonzero(np.isfinite(curve.y)) <= _FEW
    label = curve.legend if named else None
    shape = marker(curve.number) if few else ""
    options: dict[str, Any] = {"markersize": 3.5, "markevery": max(1, len(curve.x) // 8)}
    axes.plot(curve.x, curve.y, label=label, linewidth=1.3, marker=shape, **options, **style)


def _draw_dots(figure: Figure, chart: DotChart) -> None:
    axes = figure.subplots()
    places = np.arange(len(chart.rows))
    for dots, offset in zip(chart.series, row_offsets(len(chart.series)), strict=True):
        _draw_series(axes, dots, places + offset)
    axes.set_yticks(places, list(chart.rows))
    axes.set_ylim(len(chart.rows) - 0.5, -0.5)
    if chart.logarithmic:
        log_if_wide(axes, np.concatenate([dots.values for dots in chart.series]), "x")
    if chart.from_zero:
        axes.set_xlim(left=0)
    if chart.x_format == "share":
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel(chart.axis_label)
    tidy(axes, "both")
    legend_above(figure, _handles(axes))


def _handles(*all_axes: Axes) -> dict[str, Any]:
    return {str(line.get_label()): line for axes in all_axes for line in axes.get_legend_handles_labels()[0]}


def _draw_series(axes: Axes, dots: Dots, places: Any) -> None:
    colour = GREY if dots.number is None else line_style(dots.number)["color"]
    if dots.spread is not None:
        axes.errorbar(dots.values, places, xerr=dots.spread, fmt="none", ecolor=colour, elinewidth=1)
    shape = _SHAPES[dots.shape] if dots.number is None or dots.shape != "dot" else marker(dots.number)
    face = "white" if dots.shape == "ring" else colour
    options: dict[str, Any] = {"markersize": 10 if dots.shape == "tick" else 6, "markerfacecolor": face}
    axes.plot(dots.values, places, shape, color=colour, label=dots.label, markeredgewidth=1.5, **options)


def row_offsets(series: int) -> list[float]:
    """Return where the dots of each series lie in a row of height 1, around 0, so that none hides another."""
    return [0.0] if series < 2 else np.linspace(-0.3, 0.3, series).tolist()
