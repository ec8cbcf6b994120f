"""The report's pictures by Bokeh, whose JavaScript lies in its package: values on hover, zoom, legends that switch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bokeh
import numpy as np
from bokeh.document import Document
from bokeh.models import (
    BasicTickFormatter,
    BoxZoomTool,
    ColumnDataSource,
    DataRange1d,
    FixedTicker,
    HoverTool,
    NumeralTickFormatter,
    PanTool,
    Range1d,
    ResetTool,
    WheelZoomTool,
)
from bokeh.plotting import figure

from ddk_ds.drawing import Array, line_style
from ddk_ds.report.charts import GREY, AnyChart, Chart, Curve, DotChart, Dots, Format, Panel, spans_a_decade
from ddk_ds.report.happenings import thinned
from ddk_ds.report.still_charts import row_offsets

_FEW = 24
_LOG_TICKS = [digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5)]
"""Ticks of logarithmic axes: Bokeh's own are linear below two decades."""
SOLID = 8
"""Curves that differ by colour; further ones are dashed."""
_HEIGHT = 260
_TALL = 400
_ROW_HEIGHT, _DOT_HEIGHT = 26, 9
_TOOLTIP = {"number": "%.5g", "small": "%.3g", "share": "0.0%", "count": "0,0"}
_AXIS = {"share": "0%", "count": "0,0"}
_MARK_COLOURS = {"restart": GREY, "alarm": "#D55E00", "fault": "#CC79A7"}
_SHAPES = {"dot": "circle", "ring": "circle", "tick": "dash"}


@dataclass(frozen=True)
class LiveCharts:
    """Everything that the page needs to show its pictures live."""

    library: str
    """Bokeh's JavaScript."""
    content: str
    """JSON: Bokeh's document, and the page's element for each of its figures."""


def live(charts: Sequence[AnyChart]) -> LiveCharts:
    """Return the charts for the page's script, which puts panel P of a chart into the element `live-<name>-<P>`."""
    document, places = Document(), {}
    with document.models.freeze():  # else each figure that is added makes it go through all again
        for chart in charts:
            figures = [_dot_figure(chart)] if isinstance(chart, DotChart) else _panel_figures(chart)
            for number, one in enumerate(figures):
                document.add_root(one)
                places[one.id] = f"live-{chart.name}-{number}"
    items = [{"docid": "report", "roots": places, "root_ids": list(places)}]
    documents = {"report": document.to_json(deferred=False)}
    content = json.dumps({"documents": documents, "items": items}, separators=(",", ":"))
    library = Path(bokeh.__file__).parent / "server" / "static" / "js" / "bokeh.min.js"
    return LiveCharts(library.read_text(encoding="utf-8"), content)


def colour_of(number: int | None) -> str:
    """Return the colour of the style of this number; grey for None."""
    return GREY if number is None else str(line_style(number)["color"])


def _figure(height: int, **options: Any) -> Any:
    one = figure(
        height=height, sizing_mode="stretch_width", toolbar_location="above", output_backend="canvas", **options
    )
    zoom = BoxZoomTool()
    one.add_tools(zoom, WheelZoomTool(), PanTool(), ResetTool())
    one.toolbar.active_drag, one.toolbar.logo, one.toolbar.autohide = zoom, None, True
    one.background_fill_color = one.border_fill_color = one.outline_line_color = None
    one.axis.minor_tick_line_color = None
    return one


def _panel_figures(chart: Chart) -> list[Any]:
    wide = chart.logarithmic and spans_a_decade(np.concatenate([curve.y for curve in chart.curves]))
    shared = {"x_range": DataRange1d(only_visible=True), "y_range": DataRange1d(only_visible=True)}
    if chart.from_zero:
        shared["y_range"].start = 0
    figures = []
    for panel in chart.panels:
        one = _figure(
            _TALL if chart.tall else _HEIGHT,
            y_axis_type="log" if wide else "linear",
            tools="",
            title=panel.title or None,
            **shared,
        )
        _draw_panel(one, chart, panel)
        if one.title is not None:
            one.title.text_font_size = "13px"
        one.xaxis.axis_label, one.yaxis.axis_label = chart.x_label, chart.y_label
        if wide:
            one.yaxis.ticker = FixedTicker(ticks=_LOG_TICKS)
            one.yaxis.formatter = BasicTickFormatter()
        if chart.y_format in _AXIS:
            one.yaxis.formatter = NumeralTickFormatter(format=_AXIS[chart.y_format])
        if chart.steps:
            one.xaxis.formatter = NumeralTickFormatter(format="0,0")
        figures.append(one)
    return figures


def _draw_panel(one: Any, chart: Chart, panel: Panel) -> None:
    lines = [_draw_curve(one, curve) for curve in panel.curves]
    x_format = "0,0" if chart.steps else "%.4g"
    value = f"<b>$name</b> @y{{{_TOOLTIP[chart.y_format]}}} at @x{{{x_format}}}"
    formats: Any = {"@y": _formatter(chart.y_format), "@x": "numeral" if chart.steps else "printf"}
    look: dict[str, Any] = {"mode": "vline", "point_policy": "snap_to_data", "show_arrow": False}
    one.add_tools(HoverTool(renderers=lines, tooltips=value, formatters=formats, **look))
    if chart.level is not None:
        one.hspan(y=[chart.level[0]], line_color=GREY, line_width=1.5)
    last_step = max((float(curve.x[-1]) for curve in panel.curves if len(curve.x)), default=1.0)
    found = thinned(panel.marks, last_step)
    if found:
        columns = {"x": [mark.step for mark in found], "text": [mark.text for mark in found]}
        columns["colour"] = [_MARK_COLOURS[mark.kind] for mark in found]
        spans = one.vspan(
            x="x", source=ColumnDataSource(columns), line_color="colour", line_dash="dashed", line_width=1.5
        )
        one.add_tools(HoverTool(renderers=[spans], tooltips="@text", show_arrow=False))


def _formatter(kind: Format) -> str:
    return "printf" if "%." in _TOOLTIP[kind] else "numeral"


def _draw_curve(one: Any, curve: Curve) -> Any:
    columns = {"x": _short(curve.x), "y": _short(curve.y)}
    if curve.low is not None and curve.high is not None:
        columns |= {"low": _short(curve.low), "high": _short(curve.high)}
    if curve.behind is not None:
        columns["behind"] = _short(curve.behind)
    look: dict[str, Any] = {"source": ColumnDataSource(columns), "color": colour_of(curve.number)}
    drawn = []
    if curve.low is not None:
        drawn.append(one.varea("x", "low", "high", fill_alpha=0.2, **look))
    if curve.behind is not None:
        drawn.append(one.line("x", "behind", line_width=1, line_alpha=0.4, **look))
    if np.count_nonzero(np.isfinite(curve.y)) <= _FEW:
        drawn.append(one.scatter("x", "y", size=5, **look))
    dash = "dashed" if curve.number >= SOLID else "solid"
    line = one.line("x", "y", line_width=2, line_dash=dash, name=curve.label, **look)
    _belongs_to(curve.key, *drawn, line)
    return line


def _belongs_to(key: str, *renderers: Any) -> None:
    """Tag what is drawn, for the legends: `tags=` given to a method that draws would be those of the glyph."""
    for renderer in renderers:
        # No tool selects: glyphs of their own for what is not selected would only make the page heavier.
        renderer.update(tags=[key], nonselection_glyph="auto", muted_glyph="auto")


def _short(values: Array) -> Any:
    return values.astype(np.float32)


def _dot_figure(chart: DotChart) -> Any:
    places = np.arange(len(chart.rows), dtype=np.float64)
    row_height = max(_ROW_HEIGHT, _DOT_HEIGHT * len(chart.series))
    one = _figure(
        90 + row_height * len(chart.rows),
        x_axis_type="log" if chart.logarithmic else "linear",
        y_range=Range1d(start=len(chart.rows) - 0.3, end=-0.7),
        x_range=DataRange1d(only_visible=True),
        tools="",
    )
    if chart.from_zero:
        one.x_range.start = 0
    for dots, offset in zip(chart.series, row_offsets(len(chart.series)), strict=True):
        _draw_dots(one, chart, dots, places + offset)
    one.yaxis.ticker = FixedTicker(ticks=places.tolist())
    one.yaxis.major_label_overrides = dict(enumerate(chart.rows))
    one.ygrid.ticker = FixedTicker(ticks=(places[1:] - 0.5).tolist())
    if chart.logarithmic:
        one.xaxis.ticker = one.xgrid.ticker = FixedTicker(ticks=_LOG_TICKS)
        one.xaxis.formatter = BasicTickFormatter()
    if chart.x_format in _AXIS:
        one.xaxis.formatter = NumeralTickFormatter(format=_AXIS[chart.x_format])
    one.xaxis.axis_label = chart.axis_label
    return one


def _draw_dots(one: Any, chart: DotChart, dots: Dots, places: Array) -> None:
    columns = {"x": dots.values, "y": places, "row": list(chart.rows)}
    if dots.spread is not None:
        columns |= {"low": dots.values - dots.spread, "high": dots.values + dots.spread, "spread": dots.spread}
    source = ColumnDataSource(columns)
    colour, drawn = colour_of(dots.number), []
    value = f"<b>$name</b> @row @x{{{_TOOLTIP[chart.x_format]}}}"
    if dots.spread is not None:
        drawn.append(one.segment("low", "y", "high", "y", source=source, line_color=colour, line_width=2))
        value += " ± @spread{%.2g}"
    angle = np.pi / 2 if dots.shape == "tick" else 0.0
    size = 16 if dots.shape == "tick" else 10
    look: dict[str, Any] = {"line_color": colour, "line_width": 2, "angle": angle, "size": size}
    look["fill_color"] = None if dots.shape == "ring" else colour
    centres = one.scatter("x", "y", source=source, marker=_SHAPES[dots.shape], name=dots.label, **look)
    _belongs_to(dots.key, *drawn, centres)
    printf: Any = {"@x": _formatter(chart.x_format), "@spread": "printf"}
    one.add_tools(HoverTool(renderers=[centres], tooltips=value, formatters=printf))
