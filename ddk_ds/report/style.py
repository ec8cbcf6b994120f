"""Colours, lines and hatches that are told apart in print and by colour-blind readers; a picture as SVG or PNG."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
