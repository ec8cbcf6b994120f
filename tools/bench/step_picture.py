"""The picture of tools/bench/bench_step.py: tokens/s and peak memory of each implementation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddk_ds.drawing import WIDTH, bar_style, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {
    "floor": "bare passes (floor)",
    "kd": "this project: CE + KL",
    "cpt": "this project: CE alone",
    "full_logits": "two engines, full logits",
    "trl": "TRL, chunked loss",
    "trl_gkd": "TRL, GKD",
}
# Key, unit, format, and what it is.
PANELS = (("tokens_per_s", 1.0, ",.0f", "tokens/s"), ("peak_bytes", 1e9, ".2f", "peak memory of a rank, GB"))


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture of the benchmark's result, bars by implementation, ranks and micro-batches, to `path`.

    Variants of a configuration are left to the table.
    """
    # Only here: numbers alone need no matplotlib.
    from matplotlib.figure import Figure

    cases = [case for case in result["cases"] if not case["options"]]
    impls = list(dict.fromkeys(case["impl"] for case in cases))
    kinds = list(dict.fromkeys((case["ranks"], case["accumulation"]) for case in cases))
    height = 1.4 + len(impls) * (0.25 + 0.22 * len(kinds))
    figure = Figure(figsize=(2 * WIDTH, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, (key, unit, form, what) in zip((left, right), PANELS, strict=True):
        for place, kind in enumerate(kinds):
            found = [case for case in cases if (case["ranks"], case["accumulation"]) == kind]
            _bars(axes, found, impls, place, len(kinds), (key, unit, form), label=_label(kind, kinds))
        axes.set_xlabel(what)
        axes.margins(x=0.18)
        tidy(axes, "x")
    left.set_yticks(range(len(impls)), [NAMES[impl] for impl in impls])
    left.invert_yaxis()
    one = cases[0]
    setting = (
        f"{result['device']}, {one['precision']}, {one['tokens'] // one['ranks']:,} tokens a step and rank, "
        f"samples of {one['length']:,}, vocabulary {one['vocab_size']:,}"
    )
    handles, labels = left.get_legend_handles_labels()
    look: dict[str, Any] = {"frameon": False, "fontsize": 9, "alignment": "left", "title_fontsize": 9}
    figure.legend(handles, labels, loc="outside upper left", ncols=4, title=setting, **look)
    figure.savefig(path, dpi=150)


def _label(kind: tuple[int, int], kinds: list[tuple[int, int]]) -> str:
    ranks, accumulation = kind
    text = f"{ranks} rank{'s' * (ranks > 1)}"
    several = len({number for _, number in kinds}) > 1
    return f"{text}, {accumulation} micro-batch{'es' * (accumulation > 1)}" if several else text


def _bars(
    axes: Axes,
    cases: list[dict[str, Any]],
    impls: list[str],
    place: int,
    places: int,
    column: tuple[str, float, str],
    label: str,
) -> None:
    """Bars of one number of ranks and micro-batches, the `place`-th of `places` beside one another."""
    key, unit, form = column
    thick = 0.8 / places
    at = [impls.index(case["impl"]) + (place - (places - 1) / 2) * thick for case in cases]
    values = [(case[key] or 0.0) / unit for case in cases]
    bars = axes.barh(at, values, thick, label=label, linewidth=0.5, **bar_style(place))
    words = [case["error"] or format(value, form) for case, value in zip(cases, values, strict=True)]
    axes.bar_label(bars, words, padding=3, fontsize=8)
