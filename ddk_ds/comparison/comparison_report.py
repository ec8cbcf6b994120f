"""The report on a comparison: comparison.json, its tables as Markdown, and its picture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddk_ds.comparison.paired_tests import LEVEL
from ddk_ds.drawing import bar_style, log_if_wide, tidy
from ddk_ds.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SLANTED: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}


def write_report(comparison: dict[str, Any], out: Path) -> bool:
    """Write comparison.json, comparison.md and comparison.png to `out`; return False where matplotlib is missing.

    Without matplotlib the picture is left out.
    """
    write_text(out / "comparison.json", json.dumps(comparison, indent=1) + "\n")
    write_text(out / "comparison.md", markdown(comparison))
    if find_spec("matplotlib") is None:
        return False
    draw(comparison, out / "comparison.png")
    return True


def markdown(comparison: dict[str, Any]) -> str:
    """Return the text of comparison.md for the content of comparison.json."""
    methods = comparison["methods"]
    parts = [
        "# Comparison",
        "Mean ± sample standard deviation over seeds; the number of seeds is in brackets.",
        "## Perplexity on held-out text, by domain",
        _perplexities(comparison, methods),
        "## Cost, means over seeds",
        _costs(methods),
        "Training FLOPs: 3 student forwards a token + 1 teacher forward; a forward is 2 P + 2 L H T (P: weights with "
        "the head and without the embedding's lookup; L layers of width H; T positions, attention causal). Evaluation: "
        "its share of FLOPs and of time, which has the controller's seconds in it. Earlier stages (TED's filters, "
        "DoReMi's two models) come on top.",
    ]
    if comparison["teacher_cost"] is not None:
        parts += ["## The teacher, sums over seeds", *_teacher(comparison["teacher_cost"])]
    if comparison["ranking"] is not None:
        parts += ["## Ranking", *_ranking(comparison)]
    if comparison["differences"]:
        parts += [f"## Difference to {comparison['baseline']}, paired by seed", *_differences(comparison)]
    if comparison["remarks"]:
        parts += ["## Remarks", "\n".join(f"- {remark}" for remark in comparison["remarks"])]
    versions = ", ".join(f"{name} {'/'.join(values)}" for name, values in comparison["versions"].items())
    parts.append(f"Ranks: {', '.join(map(str, comparison['ranks']))}. Versions: {versions}.")
    return "\n\n".join(parts) + "\n"


def _perplexities(comparison: dict[str, Any], methods: dict[str, Any]) -> str:
    teacher, start = comparison["teacher_ppl"], comparison["start_ppl"]
    rows = [
        [
            name,
            "-" if teacher is None else _number(teacher[name]),
            _number(start[name]),
            *(_spread(method["ppl"][name]) for method in methods.values()),
        ]
        for name in comparison["domains"]
    ]
    for metric, title in comparison["metrics"].items():
        of_teacher = "-" if teacher is None else _number(comparison["teacher"][metric], 3)
        of_methods = [_spread(method[metric], 3) + _domains(metric, method) for method in methods.values()]
        rows.append([title, of_teacher, _number(comparison["start"][metric], 3), *of_methods])
    headings = [f"{label} ({len(method['seeds'])})" for label, method in methods.items()]
    return _table(["domain", "teacher", "before", *headings], rows)


def _domains(metric: str, method: dict[str, Any]) -> str:
    """Return the worst domains, with their numbers of seeds if there are several; "" for another metric."""
    if metric != "worst_ratio":
        return ""
    worst = method["worst_domains"]
    return " " + ", ".join(name if len(worst) == 1 else f"{name} ({count})" for name, count in worst.items())


def _costs(methods: dict[str, Any]) -> str:
    headings = ["method", "tokens", "time, s", "FLOPs", "evaluation, FLOPs", "evaluation, time", "controller, s"]
    earlier = any(method["earlier_tokens"] for method in methods.values())
    rows = []
    for label, method in methods.items():
        row = [label, _number(method["tokens"], 0), _number(method["wall_s"], 1), _flops(method["flops"])]
        row += [_percent(method["evaluation_flops_share"]), _percent(method["evaluation_time_share"])]
        row.append(_number(method["controller_s"], 3))
        if earlier:
            # Only methods of several stages have them.
            tokens, wall_s, flops = (method[f"earlier_{key}"] or None for key in ("tokens", "wall_s", "flops"))
            row += [_number(tokens, 0), _number(wall_s, 1), _flops(flops)]
        rows.append(row)
    return _table([*headings, *(["earlier tokens", "earlier time, s", "earlier FLOPs"] if earlier else [])], rows)


def _teacher(cost: dict[str, Any]) -> Iterable[str]:
    rows = [[label, _cached(sums), *_sums(sums)] for label, sums in cost["methods"].items()]
    total = cost["on_caches"]
    rows.append(["all on the cache", _cached(total), *_sums(total)])
    headings = ["method", "runs on the cache", "samples in the loss", "through the teacher", "FLOPs"]
    yield _table([*headings, "FLOPs without the cache", "teacher, s"], rows)
    if total["flops"] is not None and total["flops_without"]:
        yield (
            f"The runs on the cache paid {total['flops'] / total['flops_without']:.1%} of the teacher that they would "
            "have paid without it."
        )
    yield (
        "Last stages alone, by the ledgers' lines of steps. Not in it are steps that a kill or a roll-back undid, "
        "held-out samples, and samples that `ddk teach` or runs elsewhere filled. Seconds are rank 0's in the "
        "teacher's layers, and in its head where it fills a cache: without one the head is a part of the loss."
    )
    for cache in cost["caches"]:
        if cache["samples"] is None:
            yield f"The cache {cache['path']} cannot be read any more."
            continue
        samples, size = sum(cache["samples"].values()), cache["bytes"]
        yield f"The cache {cache['path']} weighs {size / 1e6:,.1f} MB: {samples:,} samples."


def _cached(sums: dict[str, Any]) -> str:
    return f"{sums['cached']} of {sums['runs']}"


def _sums(sums: dict[str, Any]) -> list[str]:
    counts = [_number(sums["asked"], 0), _number(sums["taught"], 0)]
    return [*counts, _flops(sums["flops"]), _flops(sums["flops_without"]), _number(sums["seconds"], 1)]


def _ranking(comparison: dict[str, Any]) -> list[str]:
    places, seeds = comparison["ranking"]["places"], comparison["ranking"]["seeds"]
    rows = []
    for number, place in enumerate(places, 1):
        ranks, gap = place["ranks"], place["to_next"]
        row = [str(number), place["label"], f"{sum(ranks) / len(ranks):.1f}", f"{min(ranks):g} to {max(ranks):g}"]
        row += ["-", "-", ""] if gap is None else [_signed(gap["mean"], 4), _p(gap["p_holm"]), _told_apart(gap)]
        rows.append(row)
    headings = ["", "method", "mean rank", "ranks", "to the next", "p, Holm", ""]
    return [
        f"By {comparison['metrics']['score']}, the best first, over the seeds that all have "
        f"({', '.join(map(str, seeds))}). Ranks are those within a seed.",
        _table(headings, rows),
        "Each is tested against the next by a paired t-test over seeds, with Holm's correction for these "
        f"{len(places) - 1} tests. Where two cannot be told apart, their order may be chance.",
    ]


def _told_apart(gap: dict[str, Any]) -> str:
    differs = gap["p_holm"] is not None and gap["p_holm"] < LEVEL
    return "better than the next" if differs else "cannot be told apart from the next"


def _differences(comparison: dict[str, Any]) -> list[str]:
    differences = comparison["differences"]
    by_domain = [
        [name, *(_difference(found["ppl"][name]) for found in differences.values())] for name in comparison["domains"]
    ]
    return [
        "Less than 0 is better than the baseline. Interval and p are those of a paired t-test over seeds, each for "
        f"itself. p, Holm is corrected for the {len(differences)} tests of its table, by Holm's method: a difference "
        f"exceeds the spread where it is below {LEVEL:g}.",
        *(_metric_differences(differences, metric, title) for metric, title in comparison["metrics"].items()),
        f"By domain, in perplexity: mean difference ± standard error; * exceeds the spread, with Holm's correction for "
        f"all {len(by_domain) * len(differences)} tests of this table.",
        _table(["domain", *differences], by_domain),
    ]


def _metric_differences(differences: dict[str, Any], metric: str, title: str) -> str:
    rows = []
    for label, found in differences.items():
        one = found[metric]
        interval = "-" if one["low"] is None else f"{one['low']:+.4f} to {one['high']:+.4f}"
        mean, error = (_signed(one[key], 4) for key in ("mean", "standard_error"))
        row = [label, str(one["seeds"]), mean, error.lstrip("+"), interval, _p(one["p"]), _p(one["p_holm"])]
        rows.append([*row, one["verdict"]])
    headings = ["method", "seeds", f"{title}, difference", "standard error", "95 % interval", "p", "p, Holm"]
    return _table([*headings, "against the spread"], rows)


def _difference(difference: dict[str, Any]) -> str:
    if difference["mean"] is None:
        return "-"
    error = "" if difference["standard_error"] is None else f" ± {difference['standard_error']:.2f}"
    star = " *" if difference["verdict"] == "exceeds the spread" else ""
    return f"{difference['mean']:+.2f}{error}{star}"


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _signed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:+,.{digits}f}"


def _flops(value: float | None) -> str:
    return "-" if value is None else f"{value:.3e}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _spread(spread: dict[str, Any], digits: int = 2) -> str:
    return _number(spread["mean"], digits) + ("" if spread["sd"] is None else f" ± {_number(spread['sd'], digits)}")


def draw(comparison: dict[str, Any], path: Path) -> None:
    """Draw perplexity by domain, and the score of each run by method. Needs matplotlib."""
    # Only here: the report's text needs no matplotlib, which not every machine has.
    from matplotlib.figure import Figure

    methods, domains = comparison["methods"], comparison["domains"]
    width = min(20.0, max(5.0, 0.22 * len(domains) * (len(methods) + 1)))
    figure = Figure(figsize=(width + max(3.0, 0.7 * len(methods)), 4.8), layout="constrained")
    bars, points = figure.subplots(1, 2, width_ratios=[width, max(3.0, 0.7 * len(methods))])
    _draw_domains(bars, comparison)
    _draw_score(points, comparison)
    figure.supxlabel("bars and lines: means over seeds; error bars: sample standard deviation", fontsize=8)
    figure.savefig(path, dpi=150)


def _draw_domains(axes: Axes, comparison: dict[str, Any]) -> None:
    methods, domains = comparison["methods"], comparison["domains"]
    places, width = np.arange(len(domains)), 0.8 / len(methods)
    for number, (label, method) in enumerate(methods.items()):
        spreads = [method["ppl"][name] for name in domains]
        axes.bar(
            places - 0.4 + width * (number + 0.5),
            [spread["mean"] for spread in spreads],
            width,
            yerr=None if spreads[0]["sd"] is None else [spread["sd"] for spread in spreads],
            **bar_style(number),
            linewidth=0.6,
            label=f"{label} ({len(method['seeds'])})",
            capsize=2,
        )
    for key, colour, label in (("start_ppl", "0.5", "before training"), ("teacher_ppl", "black", "teacher")):
        if comparison[key] is not None:
            levels = [comparison[key][name] for name in domains]
            axes.hlines(levels, places - 0.45, places + 0.45, colors=colour, linewidth=2, label=label)
    log_if_wide(axes, list(_levels(comparison)))
    axes.set_ylabel("perplexity on held-out text (per token)")
    axes.set_xlabel("domain")
    axes.set_xticks(places, domains, **_SLANTED)
    axes.margins(x=0.01)
    columns = max(3, len(domains) * (len(methods) + 1) // 8)
    axes.legend(fontsize=8, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    tidy(axes)


def _levels(comparison: dict[str, Any]) -> Iterable[float]:
    """Yield every perplexity that the picture shows."""
    for key in ("start_ppl", "teacher_ppl"):
        yield from (comparison[key] or {}).values()
    for method in comparison["methods"].values():
        yield from (spread["mean"] for spread in method["ppl"].values())


def _draw_score(axes: Axes, comparison: dict[str, Any]) -> None:
    for number, method in enumerate(comparison["methods"].values()):
        score, values = method["score"], method["score"]["values"]
        axes.errorbar(number, score["mean"], yerr=score["sd"], fmt="_", color="black", markersize=24, capsize=4)
        offsets = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else [0.0]
        axes.scatter(
            number + np.array(offsets), values, color=bar_style(number)["color"], edgecolor="black", zorder=3, s=36
        )
    axes.set_xticks(range(len(comparison["methods"])), list(comparison["methods"]), **_SLANTED)
    axes.set_xlabel("method (a point for each seed)")
    axes.set_ylabel(comparison["metrics"]["score"])
    axes.margins(x=0.15)
    tidy(axes)
