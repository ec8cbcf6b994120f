"""Content of the report's pictures: panels of curves, or rows of dots. Two modules draw it, live and still."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ddk_ds.drawing import BINS, Array, envelope

GREY = "#858585"
"""A colour that can be seen on white and on black: the teacher, the student before training."""
Format = Literal["number", "share", "count", "small"]


@dataclass(frozen=True)
class Curve:
    """A line over steps or tokens; vectors are (P,)."""

    label: str
    key: str
    """Name of the thing that it belongs to, such as `run:demo` or `domain:python`: the legend switches by it."""
    number: int
    """Number of its style, from 0."""
    x: Array
    y: Array
    low: Array | None = None
    """Lower end of the band around the line; None without a band."""
    high: Array | None = None
    behind: Array | None = None
    """Values as they were, drawn pale behind a smoothed line; None where `y` is not smoothed."""

    @property
    def legend(self) -> str:
        """Return its name in the legend, which several seeds share."""
        return self.key.partition(":")[2]


@dataclass(frozen=True)
class Mark:
    """An event on the axis of steps."""

    step: float
    kind: str
    text: str


@dataclass(frozen=True)
class Panel:
    """Curves that share one pair of axes."""

    title: str
    curves: Sequence[Curve]
    marks: Sequence[Mark] = ()


@dataclass(frozen=True)
class Chart:
    """Panels of curves with equal axes."""

    name: str
    """Name of its file, without the ending."""
    title: str
    panels: Sequence[Panel]
    x_label: str
    y_label: str
    caption: str
    steps: bool = True
    """True if the x axis counts optimizer steps."""
    y_format: Format = "number"
    level: tuple[float, str] | None = None
    """A horizontal line at this value, with its name."""
    from_zero: bool = False
    logarithmic: bool = False
    """True if the axis of values is logarithmic where the values span a decade."""
    tall: bool = False

    @property
    def curves(self) -> list[Curve]:
        """Return the curves of all panels."""
        return [curve for panel in self.panels for curve in panel.curves]

    @property
    def alt(self) -> str:
        """Return the content of the picture in words and numbers, for readers who do not see it."""
        words = []
        for panel in self.panels:
            named = f"{panel.title}: " if panel.title else ""
            words.append(named + "; ".join(f"{curve.label} {_first_to_last(curve)}" for curve in panel.curves))
        return f"Lines of {self.title[0].lower()}{self.title[1:]}: {self.y_label} over {self.x_label}. " + ". ".join(
            words
        )


@dataclass(frozen=True)
class Dots:
    """Dots in one row of a table of pictures: a value for each row."""

    label: str
    key: str
    number: int | None
    """Number of its style; None is grey."""
    values: Array
    """(R,) values, NaN where there is none."""
    spread: Array | None = None
    """(R,) standard deviation over seeds, drawn as a line through the dot."""
    shape: Literal["dot", "ring", "tick"] = "dot"


@dataclass(frozen=True)
class DotChart:
    """Rows, each with a dot for every series, on one axis."""

    name: str
    title: str
    rows: Sequence[str]
    series: Sequence[Dots]
    x_label: str
    caption: str
    x_format: Format = "number"
    from_zero: bool = False

    @property
    def logarithmic(self) -> bool:
        """Return True if the greatest value is more than ten times the least, both above 0."""
        return not self.from_zero and spans_a_decade(np.concatenate([dots.values for dots in self.series]))

    @property
    def axis_label(self) -> str:
        """Return the label of the axis of values."""
        return f"{self.x_label}, logarithmic" if self.logarithmic else self.x_label

    @property
    def alt(self) -> str:
        """Return the content of the picture in words and numbers, for readers who do not see it."""
        shown = "; ".join(
            f"{row}: " + ", ".join(f"{dots.label} {dots.values[place]:.3g}" for dots in self.series)
            for place, row in enumerate(self.rows)
        )
        return f"{self.title}, {self.x_label}. {shown}."


AnyChart = Chart | DotChart


def step_curve(label: str, key: str, number: int, x: Array, y: Array, *, smooth: bool = False) -> Curve:
    """Return a curve over steps in at most BINS bins, with a band from least to greatest value of each.

    With `smooth` the line is the running mean, and the values themselves lie pale behind it.
    """
    binned = envelope(x, y)
    low, high = (binned.low, binned.high) if binned.per_bin > 1 else (None, None)
    width = smoothing_width(len(y)) if smooth else 1
    if width == 1:
        return Curve(label, key, number, binned.x, binned.mean, low, high)
    smoothed = running_mean(y, width)[np.searchsorted(x, binned.x)]
    return Curve(label, key, number, binned.x, smoothed, low, high, binned.mean)


def smoothing_width(points: int) -> int:
    """Return the number of steps, odd, that a smoothed value is the mean of: a twentieth of all, 1 if they are few."""
    return 2 * (points // 40) + 1


def running_mean(values: Array, width: int) -> Array:
    """Return the mean of `width` values (odd) around each of P values (P,), fewer at both ends; NaN counts nothing."""
    finite = np.isfinite(values)
    sums = np.cumsum(np.append(0.0, np.where(finite, values, 0.0)))
    counts = np.cumsum(np.append(0, finite))
    places = np.arange(len(values))
    first, last = np.maximum(places - width // 2, 0), np.minimum(places + width // 2 + 1, len(values))
    number = counts[last] - counts[first]
    return np.divide(sums[last] - sums[first], number, out=np.full(len(values), np.nan), where=number > 0)


def mean_curve(label: str, key: str, number: int, x: Array, y: Array) -> Curve:
    """Return the running mean alone, for pictures with so many curves that the values behind them would be too much."""
    places = envelope(x, y).x
    return Curve(label, key, number, places, running_mean(y, smoothing_width(len(y)))[np.searchsorted(x, places)])


def describe_curve(points: int) -> str:
    """Return the sentences about bins and smoothing of curves of so many steps; empty before the first step."""
    per_bin = 1 if points <= 2 * BINS else -(-points // BINS)
    width = smoothing_width(points)
    text = "A point is a step." if points else ""
    if width > 1:
        text = f"A smooth line is the mean of {width:,} steps; pale behind it is each step as it was."
    if per_bin > 1:
        text = (
            f"A bin has {per_bin:,} steps, and the band reaches from its least to its greatest value. A smooth line is "
            f"the mean of {width:,} steps."
        )
    return text


def spans_a_decade(values: Array) -> bool:
    """Return True if the greatest value above 0 is more than ten times the least, and none is below."""
    shown = values[np.isfinite(values)]
    return bool(len(shown) and shown.min() > 0 and shown.max() > 10 * shown.min())


def _first_to_last(curve: Curve) -> str:
    values = curve.y if curve.behind is None else curve.behind
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "no finite value"
    low = finite if curve.low is None else curve.low[np.isfinite(curve.low)]
    high = finite if curve.high is None else curve.high[np.isfinite(curve.high)]
    return f"from {finite[0]:.4g} to {finite[-1]:.4g}, between {low.min():.4g} and {high.max():.4g}"
