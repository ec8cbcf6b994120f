"""Colours, lines and hatches that are told apart in print and by colour-blind readers; a picture as SVG or PNG.

Long series made short: the mean, least and greatest value of each bin, so that no spike is lost.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart; hatches and dashes do so in print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "--", "oo")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# On white, yellow is no colour for a thin line.
_LINE_COLOURS = tuple("#8A7F00" if colour == "#F0E442" else colour for colour in COLOURS)
WIDTH = 4.8
"""Inches; small enough that letters of 9 or 10 points can be read on a phone that shows a picture over its width."""
_SETTINGS: dict[str, Any] = {
    "font.size": 10.0,
    "text.parse_math": False,  # a domain's name is no formula
    "svg.hashsalt": "ddk_ds",  # the same numbers give the same file
    "hatch.linewidth": 0.5,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Picture:
    """A picture of the report."""

    name: str
    """Of its file, without the ending."""
    title: str
    svg: str
    alt: str
    """What it shows, in words and numbers."""
    caption: str


def bar_style(number: int) -> dict[str, Any]:
    """Of the bars or areas of the number-th thing."""
    return {"color": COLOURS[number % len(COLOURS)], "hatch": _moved(HATCHES, number), "edgecolor": "black"}


def line_style(number: int) -> dict[str, Any]:
    """Of the line of the number-th thing; its colour is that of `bar_style`."""
    return {"color": _LINE_COLOURS[number % len(COLOURS)], "linestyle": _moved(DASHES, number)}


def marker(number: int) -> str:
    """Of the points of the number-th thing."""
    found: str = _moved(MARKERS, number)
    return found


def _moved(kinds: tuple[Any, ...], number: int) -> Any:
    # Beyond the number of colours they move on, so that no two things look the same.
    return kinds[(number + number // len(COLOURS)) % len(kinds)]


def tidy(axes: Axes, grid: str = "y") -> None:
    """Leave out what says nothing."""
    axes.grid(axis=grid, alpha=0.3)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_above(axes: Axes, columns: int = 3) -> None:
    """The legend at the picture's upper edge, where it hides nothing; long names get fewer columns."""
    handles, labels = axes.get_legend_handles_labels()
    figure: Figure = axes.figure  # type: ignore[assignment]
    # Inches: a handle with its gaps, and a letter of 9 points.
    widest = 0.6 + 0.075 * max(map(len, labels), default=0)
    columns = max(1, min(columns, int(figure.get_figwidth() / widest)))
    look: dict[str, Any] = {"frameon": False, "fontsize": 9, "handlelength": 2.6, "columnspacing": 1.2}
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, borderaxespad=0.2, **look)


def to_svg(draw: Callable[[Figure], None], height: float = 3.0) -> str:
    """What `draw` puts on a figure of WIDTH x height inches, as SVG whose letters need no font."""
    # Only here: a terminal's screen needs no matplotlib.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[np.float64]
BINS = 300
_FEW = 40
_LONG_SPANS = ((172800.0, 86400.0, "days"), (7200.0, 3600.0, "hours"), (180.0, 60.0, "minutes"))
_COUNTS = ((2e9, 1e9, "billion "), (2e6, 1e6, "million "), (2e4, 1e3, "thousand "))


@dataclass(frozen=True)
class Envelope:
    """Of B bins; vectors are (B,). A bin without a finite value is NaN."""

    x: Array
    """Of each bin's last point."""
    mean: Array
    low: Array
    high: Array
    per_bin: int
    """Points in a bin; 1: nothing was put together."""


def envelope(x: Array, y: Array, bins: int = BINS) -> Envelope:
    """Put the points (P,) together into at most `bins` bins, if there are more than twice as many."""
    points = len(x)
    if points <= 2 * bins:
        return Envelope(x, y, y, y, 1)
    per_bin = -(-points // bins)
    padded = np.full(-(-points // per_bin) * per_bin, np.nan)
    padded[:points] = np.where(np.isfinite(y), y, np.nan)
    rows = padded.reshape(-1, per_bin)
    last = np.minimum(np.arange(1, len(rows) + 1) * per_bin, points) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a bin without a finite value
        return Envelope(x[last], np.nanmean(rows, 1), np.nanmin(rows, 1), np.nanmax(rows, 1), per_bin)


def draw_curve(axes: Axes, x: Array, y: Array, label: str, style: dict[str, Any], marker: str = "") -> None:
    """A line through the points, or through the bins' means with a band from the least to the greatest value."""
    found = envelope(x, y)
    if found.per_bin > 1:
        axes.fill_between(found.x, found.low, found.high, color=style["color"], alpha=0.25, linewidth=0)
    few = np.count_nonzero(np.isfinite(y)) <= _FEW
    axes.plot(found.x, found.mean, label=label, linewidth=1.3, marker=marker if few else "", markersize=3.5, **style)


def thinned(points: int, what: str) -> str:
    """The sentence of a caption that says how points were put together, or nothing."""
    per_bin = 1 if points <= 2 * BINS else -(-points // BINS)
    if per_bin == 1:
        return ""
    return f" {per_bin:,} {what} are put together in a bin: line = mean, band = least to greatest value of the bin."


def count_unit(largest: float) -> tuple[float, str]:
    """What to divide counts by, and the word for it with a space behind."""
    return next(((by, word) for least, by, word in _COUNTS if largest >= least), (1.0, ""))


def time_unit(longest_s: float) -> tuple[float, str]:
    """What to divide seconds by, and the unit's name."""
    return next(((by, word) for least, by, word in _LONG_SPANS if longest_s >= least), (1.0, "seconds"))


def log_if_wide(axes: Axes, values: Sequence[float] | Array, axis: str = "y") -> bool:
    """A logarithmic axis where the greatest of the values is more than ten times the least; whether it is."""
    # Only here: a terminal's screen needs no matplotlib.
    from matplotlib.ticker import LogLocator, NullFormatter

    shown = np.asarray(values, np.float64)
    shown = shown[np.isfinite(shown) & (shown > 0)]
    if not len(shown) or shown.max() <= 10 * shown.min():
        return False
    low, high = shown.min() / 1.3, shown.max() * 1.3
    if axis == "y":
        axes.set_yscale("log")
        axes.set_ylim(low, high)
    else:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
    ticks = axes.yaxis if axis == "y" else axes.xaxis
    decades = np.log10(high / low)
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter(NullFormatter())
    return True
