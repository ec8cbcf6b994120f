"""Long series made short: the mean, least and greatest value of each bin, so that no spike is lost."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

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
