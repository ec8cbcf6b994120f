"""The table and the picture of `tools/plan.py --layouts`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from rich.table import Table

from ddk_ds.errors import ConfigError
from ddk_ds.planner.layouts import LayoutPoint, advised
from ddk_ds.planner.plan import Plan
from ddk_ds.report.style import line_style, marker, tidy
from tools.plan_report import plain_table


def layouts_table(points: Sequence[LayoutPoint]) -> Table:
    """A row for each network and size, tokens/s a GPU of each layout, and what is advised."""
    names = list(dict.fromkeys(point.name for point in points))
    table = plain_table("teacher's weights: tokens/s a GPU, simulated", "GB/s", "GPUs", *names, "advised")
    for (link, gpus), row in _clusters(points):
        cells = [f"{point.tokens_per_s_per_gpu:,.0f}{'' if point.fits else ' (no)'}" for point in row]
        best = advised(row)
        chosen = "none fits" if best is None else best.shard_within
        if best is not None and best.micro_batches_per_pass > 1:
            chosen += f", {best.micro_batches_per_pass} a pass"
        table.add_row(f"{link / 1e9:g}", f"{gpus:,}", *cells, chosen)
    table.caption = "(no): does not fit the devices' memory"
    return table


def _clusters(points: Sequence[LayoutPoint]) -> Iterator[tuple[tuple[float, int], list[LayoutPoint]]]:
    for cluster, row in groupby(points, lambda point: (point.link_bytes_per_s, point.gpus)):
        yield cluster, list(row)


def draw_layouts(points: Sequence[LayoutPoint], plan: Plan, path: Path) -> None:
    """Tokens/s a GPU over the number of GPUs, a panel for each network. Hollow points do not fit. Needs matplotlib."""
    if find_spec("matplotlib") is None:
        raise ConfigError(f"--layouts {path}: it needs matplotlib (pip install matplotlib), or leave it out")
    # Only here: all else needs no matplotlib, which not every machine has.
    from matplotlib.figure import Figure

    links = list(dict.fromkeys(point.link_bytes_per_s for point in points))
    names = list(dict.fromkeys(point.name for point in points))
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, len(links), sharey=True)
    for axes, link in zip(panels, links, strict=True):
        for number, name in enumerate(names):
            line = [point for point in points if point.name == name and point.link_bytes_per_s == link]
            gpus, speeds = [point.gpus for point in line], [point.tokens_per_s_per_gpu for point in line]
            style = line_style(number)
            axes.plot(gpus, speeds, marker=marker(number), markersize=6, linewidth=1.6, label=name, **style)
            for x, y, point in zip(gpus, speeds, line, strict=True):
                if not point.fits:
                    axes.plot(x, y, marker=marker(number), color=style["color"], markerfacecolor="white", zorder=3)
        axes.set_xscale("log", base=2)
        ticks = sorted({point.gpus for point in points})
        axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45)
        axes.set_xlabel("number of GPUs")
        axes.set_title(f"network of {link / 1e9:g} GB/s a GPU", fontsize=10)
        tidy(axes)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("tokens/s a GPU")
    handles, labels = panels[0].get_legend_handles_labels()
    config, cluster = plan.config, plan.cluster
    title = (
        f"{config.name}: simulated step, {cluster.gpu.name}, {cluster.gpus_per_node} a node; "
        "teacher.shard_within and micro_batches_per_pass (hollow: does not fit)"
    )
    figure.legend(handles, labels, loc="outside upper left", ncols=5, title=title, frameon=False, alignment="left")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--layouts {path}: cannot be written: {error}") from error
