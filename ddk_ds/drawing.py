"""How pictures are drawn: styles that differ in print and for colour-blind readers, long series in bins, SVG.

A long series is drawn as the mean, least and greatest value of each bin, so that no spike is lost.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
"""Okabe and Ito's colours, which differ for colour-blind readers; hatches and dashes differ in print."""
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "--", "oo")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# A thin yellow line cannot be seen on white.
_LINE_COLOURS = tuple("#8A7F00" if colour == "#F0E442" else colour for colour in COLOURS)
WIDTH = 4.8
"""Width of a picture in inches: on a phone as wide as the picture, letters of 9 or 10 points can be read."""
_SETTINGS: dict[str, Any] = {
    "font.size": 10.0,
    "text.parse_math": False,  # the name of a domain is no formula
    "svg.fonttype": "none",  # as text: a fifth of the size of letters as paths
    "svg.hashsalt": "ddk_ds",  # the same numbers give the same file
    "hatch.linewidth": 0.5,
    "path.simplify": True,
}


def bar_style(number: int) -> dict[str, Any]:
    """Return the style of the bars or areas of series `number`, from 0."""
    return {"color": COLOURS[number % len(COLOURS)], "hatch": _shifted(HATCHES, number), "edgecolor": "black"}


def line_style(number: int) -> dict[str, Any]:
    """Return the style of the line of series `number`, in nearly the colour of its `bar_style`."""
    return {"color": _LINE_COLOURS[number % len(COLOURS)], "linestyle": _shifted(DASHES, number)}


def marker(number: int) -> str:
    """Return the marker of the points of series `number`."""
    return str(_shifted(MARKERS, number))


def _shifted(kinds: tuple[Any, ...], number: int) -> Any:
    # Each further round of the colours starts one kind later, so that no two series look the same.
    return kinds[(number + number // len(COLOURS)) % len(kinds)]


def tidy(axes: Axes, grid: str = "y") -> None:
    """Remove the frame's upper and right lines, and put a pale grid behind the data."""
    axes.grid(axis=grid, alpha=0.3)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_above(figure: Figure, handles: dict[str, Any], columns: int = 3) -> None:
    """Put a legend of these labels above the picture, where it hides nothing; long labels get fewer columns."""
    # Inches: a handle with its gaps, and a letter of 9 points.
    widest = 0.6 + 0.075 * max(map(len, handles), default=0)
    columns = max(1, min(columns, int(figure.get_figwidth() / widest)))
    look: dict[str, Any] = {"frameon": False, "fontsize": 9, "handlelength": 2.6, "columnspacing": 1.2}
    if handles:
        look |= {"ncols": columns, "borderaxespad": 0.2}
        figure.legend(handles.values(), list(handles), loc="outside upper left", **look)


def to_svg(draw: Callable[[Figure], None], height: float = 3.0) -> str:
    """Call `draw` on a figure of WIDTH x height inches, and return it as SVG."""
    # Only here: the screen of a terminal needs no matplotlib.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    # The hundredth of a point is fine enough: longer numbers in lines double the size.
    shorten = re.compile(r"(\.\d\d)\d+")
    return re.sub(r' d="[^"]*"', lambda line: shorten.sub(r"\1", line[0]), stream.getvalue())


BINS = 300
_LONG_SPANS = ((172800.0, 86400.0, "days"), (7200.0, 3600.0, "hours"), (180.0, 60.0, "minutes"))
_COUNTS = ((2e9, 1e9, "billion "), (2e6, 1e6, "million "), (2e4, 1e3, "thousand "))


@dataclass(frozen=True)
class Envelope:
    """A series put into B bins; vectors are (B,). A bin without a finite value is NaN."""

    x: Array
    """Position of each bin's last point."""
    mean: Array
    low: Array
    high: Array
    per_bin: int
    """Points in a bin; 1 if the series is as it was."""


def envelope(x: Array, y: Array, bins: int = BINS) -> Envelope:
    """Put points (P,) into at most `bins` bins, if there are more than twice as many points as bins."""
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


def count_unit(largest: float) -> tuple[float, str]:
    """Return the divisor for counts up to `largest`, and its name with a space after it."""
    return next(((by, word) for least, by, word in _COUNTS if largest >= least), (1.0, ""))


def time_unit(longest_s: float) -> tuple[float, str]:
    """Return the divisor for seconds up to `longest_s`, and the unit's name."""
    return next(((by, word) for least, by, word in _LONG_SPANS if longest_s >= least), (1.0, "seconds"))


def log_if_wide(axes: Axes, values: Sequence[float] | Array, axis: str = "y") -> bool:
    """Make the axis logarithmic if the greatest value is more than ten times the least; return True if it was made."""
    # Only here: the screen of a terminal needs no matplotlib.
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
