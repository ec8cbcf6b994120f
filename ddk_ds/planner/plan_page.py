"""Tables and pictures of a plan, of the simulations and of the known points, as `ddk plan` prints and draws them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ddk_ds.drawing import line_style, marker, tidy
from ddk_ds.errors import ConfigError
from ddk_ds.planner.gpus import Cluster
from ddk_ds.planner.known_points import Point
from ddk_ds.planner.run_plan import WORTH_A_CHANGE, Plan
from ddk_ds.planner.simulations import Curve, LayoutPoint, Variant, advised

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plan_tables(plan: Plan) -> Iterator[Table | Text]:
    """Yield the tables and texts that are printed about a plan, in the order of printing."""
    yield Text.from_markup(_answer(plan))
    if plan.advice:
        yield _advice(plan)
    yield _memory(plan)
    yield _flops(plan)
    yield _time(plan)
    yield _step(plan)
    if plan.faster:
        yield _faster(plan)
    yield Text("assumed:\n" + "\n".join(f"- {line}" for line in plan.assumptions))


def _number_table(title: str, *columns: str) -> Table:
    """Make a table without rows; its first column is aligned left for words, the others right for numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f}"


def _memory(plan: Plan) -> Table:
    cluster, memory = plan.cluster, plan.memory
    ranks = f"{cluster.ranks} x {cluster.gpu.name}"
    table = _number_table(
        f"memory of a device ({ranks}, micro-batch {plan.config.train.micro_batch_samples})", "part", "GB"
    )
    for name, num_bytes in memory.device_parts.items():
        table.add_row(escape(name), _gb(num_bytes))
    table.add_section()
    table.add_row("peak (a pass's parts are freed before the update)", _gb(memory.device_bytes))
    for name, num_bytes in memory.activations.items():
        table.add_row(f"activations {name}", _gb(num_bytes))
    table.add_section()
    for name, num_bytes in memory.host_parts.items():
        table.add_row(f"host, for each device: {escape(name)}", _gb(num_bytes))
    table.add_row("host of a node, total", _gb(memory.host_bytes))
    return table


def _answer(plan: Plan) -> str:
    """Return what most users ask for: if the run fits, its time and cost, and its place on the disk."""
    memory, saved, gpu = plan.memory, plan.checkpoints, plan.cluster.gpu.name
    word = "[green]fits[/]" if memory.fits else "[bold red]does NOT fit[/]"
    largest = memory.max_micro_batch
    divides = "" if largest == memory.max_dividing else f"; that also divides a GPU's samples: {memory.max_dividing}"
    speed = "the measured speed, an MFU of" if plan.measured else "an assumed MFU of"
    return (
        f"{word}: {_gb(memory.device_bytes)} of {_gb(memory.usable_bytes)} GB that can be planned with on each {gpu}; "
        f"largest micro-batch that fits: {largest}{divides}\n"
        f"[bold]{plan.hours:,.1f} hours, {plan.gpu_hours:,.0f} GPU-hours[/]{'' if memory.fits else ' if it did'} for "
        f"{plan.tokens / 1e9:,.2f} B tokens on {plan.cluster.nodes} x {plan.cluster.gpus_per_node} GPUs: "
        f"{plan.tokens_per_s:,.0f} tokens/s, by {speed} {plan.mfu:.1%}\n"
        f"{_ceiling(plan)}\n"
        f"{_teacher(plan)}"
        f"disk: {_gb(saved.kept_bytes + saved.export_bytes)} GB for checkpoints and export, "
        f"{_gb(plan.data.shard_bytes)} GB of shards{_cache(plan)}\n"
    )


def _cache(plan: Plan) -> str:
    """Return the words about the teacher's cache: its size, the time that it takes, and the time that it saves."""
    cache = plan.cache
    if cache is None:
        return ""
    gpu_hours, nodes = cache.fill_hours * plan.cluster.ranks, plan.cluster.nodes
    return (
        f", at most {_gb(cache.num_bytes)} GB of the teacher's cache\n"
        f"teacher's cache: filling it with the tokens of this run takes {cache.fill_hours:,.1f} hours "
        f"({gpu_hours:,.0f} GPU-hours), and each run that finds them there saves as much: it pays from the second run "
        f"on, filled with all of the data ({cache.fill_all_hours:,.1f} hours) with {cache.runs_until_all_pays:,} runs; "
        f"a node then reads at most {cache.read_bytes_per_s / nodes / 1e6:,.3g} MB/s of it"
    )


def _ceiling(plan: Plan) -> str:
    """Return a sentence that compares the plan's MFU with that of the simulated step."""
    step = plan.step
    simulated = f"the simulated step (below) has an MFU of {step.mfu:.1%}, which gives {plan.least_hours:,.1f} hours"
    if plan.mfu > step.mfu:
        return (
            f"[yellow]{simulated}: hardly a run is faster, so the {'measured' if plan.measured else 'assumed'} "
            f"{plan.mfu:.1%} is too high for this configuration, or the GPU's figures are too low[/]"
        )
    advice = "" if plan.measured else "; --tokens-per-s-per-gpu takes what a run of yours has shown, in place of --mfu"
    return (
        f"{simulated}: a ceiling, because in it nothing waits for data or a slow rank, and matmuls always reach "
        f"{plan.cluster.gpu.compute_efficiency:.0%} of the peak{advice}"
    )


def _teacher(plan: Plan) -> str:
    """Return a line on what a step gathers of the teacher, with a faster place of its weights if there is one."""
    gathers, place = plan.gathers, plan.better_place
    if gathers is None or not gathers.num_bytes:
        return ""
    line = (
        f"teacher: a step gathers {_gb(gathers.num_bytes)} GB of its weights on each GPU, {gathers.seconds:.2f} s on "
        f"the links, and computes {gathers.compute_s:.2f} s with them"
    )
    if place is None:
        return f"{line}; no place of its weights makes the step {WORTH_A_CHANGE - 1:.0%} faster\n"
    passes = place.micro_batches_per_pass
    change = f"teacher.shard_within={place.shard_within}"
    change += f" teacher.micro_batches_per_pass={passes}" if passes > 1 else ""
    return (
        f"{line}: [bold]{change}[/] gives {place.tokens_per_s_per_gpu * plan.cluster.ranks:,.0f} tokens/s instead of "
        f"{plan.step.tokens_per_s:,.0f} (simulated), with {_gb(place.device_bytes)} GB on a device\n"
    )


def _advice(plan: Plan) -> Table:
    table = _number_table("changes, by the same estimate", "change", "GB a device", "fits", "GB a host", "price")
    table.columns[-1].justify = "left"
    for advice in plan.advice:
        fits = "[green]yes[/]" if advice.fits else "no"
        table.add_row(escape(advice.change), _gb(advice.device_bytes), fits, _gb(advice.host_bytes), advice.price)
    if not any(advice.fits for advice in plan.advice):
        table.caption = "none of them fits: take another GPU, a smaller model, or a lower data.sequence_length"
    return table


def _flops(plan: Plan) -> Table:
    flops, tokens = plan.flops, plan.tokens
    table = _number_table(
        "floating-point operations", f"{tokens / 1e9:,.2f} B tokens, {plan.data.steps:,} steps", "TFLOP"
    )
    for name, value in (
        ("CPT", flops.cpt),
        ("KD", flops.kd),
        ("DDK", flops.ddk),
        ("the controller's measurements in it", flops.controller),
        (f"this run ({plan.config.method}, measurements included)", flops.own),
    ):
        table.add_row(name, "-" if value is None else f"{value / 1e12:,.4g}")
    if flops.kd_over_cpt is not None and flops.ddk_over_kd is not None:
        table.add_row("KD over CPT", f"{flops.kd_over_cpt:.3f}")
        table.add_row("DDK over KD", f"{flops.ddk_over_kd:.4f}")
    return table


def _time(plan: Plan) -> Table:
    table = _number_table("time and disks", f"at an MFU of {plan.mfu:.1%}", "")
    rows: list[tuple[str, str]] = [
        ("tokens/s", f"{plan.tokens_per_s:,.0f}"),
        ("hours", f"{plan.hours:,.1f}"),
        ("GPU-hours", f"{plan.gpu_hours:,.0f}"),
    ]
    for name, value in (("CPT", plan.flops.cpt), ("KD", plan.flops.kd), ("DDK", plan.flops.ddk)):
        if value is not None:
            rows.append((f"hours of {name} at the same MFU", f"{value / plan.flop_per_s / 3600:,.1f}"))
    saved = plan.checkpoints
    rows += [
        ("shards, GB", _gb(plan.data.shard_bytes)),
        ("reading shards, MB/s, all nodes", f"{plan.read_bytes_per_s / 1e6:,.3f}"),
        ("one checkpoint, GB", _gb(saved.num_bytes)),
        (f"{plan.config.checkpoint.keep_last} kept and one being written, GB", _gb(saved.kept_bytes)),
        ("writing a checkpoint, s", f"{saved.write_s:,.1f}"),
        ("training waits for a checkpoint, s", f"{saved.pause_s:,.2f}"),
        ("from one checkpoint to the next, s", f"{saved.apart_s:,.0f}"),
        ("exported student, GB", _gb(saved.export_bytes)),
    ]
    for row in rows:
        table.add_row(*row)
    if saved.write_s > saved.apart_s:
        table.caption = "writing a checkpoint takes longer than the time to the next one: raise checkpoint.every_steps"
    return table


def _step(plan: Plan) -> Table:
    step = plan.step
    table = _number_table("simulated step", "part", "s", "share")
    for name, seconds in step.parts.items():
        table.add_row(escape(name), f"{seconds:.4f}", f"{seconds / step.seconds:.1%}")
    table.add_section()
    table.add_row("step", f"{step.seconds:.4f}", "")
    table.add_row("tokens/s", f"{step.tokens_per_s:,.0f}", "")
    table.add_row("MFU (an upper bound)", f"{step.mfu:.1%}", "")
    return table


def _faster(plan: Plan) -> Table:
    """Return the table of faster steps; its caption names the best, if it is worth a change."""
    title = "compiled layers, and a teacher in 8 bits: simulated, no GPU has measured them"
    table = _number_table(title, "change", "step, s", "tokens/s", "of now", "GB a device", "numbers")
    table.columns[-1].justify = "left"
    for one in plan.faster:
        numbers = (f"{one.step_s:.4f}", f"{one.tokens_per_s:,.0f}", f"{one.times:.2f}", _gb(one.device_bytes))
        table.add_row(escape(one.change), *numbers, one.numbers)
    best = max(plan.faster, key=lambda one: one.times)
    named = f"{best.change} is the fastest that fits, {best.times:.2f} times the configured step's speed, if it is true"
    none = f"none of them makes the step {WORTH_A_CHANGE - 1:.0%} faster"
    table.caption = escape(named if best.times > WORTH_A_CHANGE else none)
    table.caption_justify = "left"
    return table


def scaling_table(curves: Sequence[Curve]) -> Table:
    """Make the table of every curve's points."""
    table = _number_table("simulated scaling", "curve", "GPUs", "micro-batch", "step, s", "tokens/s", "MFU", "fits")
    for curve in curves:
        for point in curve.points:
            numbers = (f"{point.step_s:.3f}", f"{point.tokens_per_s:,.0f}", f"{point.mfu:.1%}")
            fits = "yes" if point.fits else "no"
            table.add_row(curve.name, f"{point.gpus:,}", f"{point.micro_batch_samples:,}", *numbers, fits)
        table.add_section()
    return table


def known_points_table(points: Sequence[Point]) -> Table:
    """Make the table of measured and simulated throughputs, with the measurements' sources."""
    table = _number_table("tokens/s a GPU", "run", "GPUs", "measured", "simulated", "off by", "source")
    sources = list(dict.fromkeys(point.source for point in points))
    for point in points:
        numbers = (f"{point.measured:,.1f}", f"{point.simulated:,.1f}", f"{point.error:+.0%}")
        table.add_row(point.name, f"{point.gpus:,}", *numbers, f"{sources.index(point.source) + 1}")
    table.caption = "\n".join(f"{number}: {escape(source)}" for number, source in enumerate(sources, 1))
    table.caption_justify = "left"
    return table


def layouts_table(points: Sequence[LayoutPoint]) -> Table:
    """Make the table of tokens/s a GPU by layout: a row for each network, number of GPUs and `teacher.quantize`.

    Each row has the advised layout.
    """
    # Their heads in two lines: a line of the table has to fit into 120 columns.
    names = dict.fromkeys(point.name.replace(", ", ",\n") for point in points)
    title = "teacher's weights: tokens/s a GPU, simulated"
    table = _number_table(title, "GB/s", "GPUs", "quantize", *names, "advised", "over none")
    plain = 0.0  # speed of the cluster's advised layout without 8 bits, which is its first row
    for (link, gpus, form), row in _clusters(points):
        cells = [f"{point.tokens_per_s_per_gpu:,.0f}{'' if point.fits else ' (no)'}" for point in row]
        best = advised(row)
        speed = 0.0 if best is None else best.tokens_per_s_per_gpu
        chosen = "none fits" if best is None else best.shard_within
        if best is not None and best.micro_batches_per_pass > 1:
            chosen += f", {best.micro_batches_per_pass} a pass"
        if form == "none":
            plain = speed
        over = f"{speed / plain - 1:+.0%}" if form != "none" and plain and speed else "-"
        table.add_row(f"{link / 1e9:g}", f"{gpus:,}", form, *cells, chosen, over)
    table.caption = (
        "(no): does not fit the devices' memory; over none: speed of the advised layout in 8 bits over that without, "
        "estimated: no GPU has measured 8 bits, and the teacher is another one"
    )
    return table


def variants_table(variants: Sequence[Variant], cluster: Cluster) -> Table:
    """Make the table of the simulated step by the values of the varied options; there is at least one variant."""
    gpu = cluster.gpu
    network = f"network of {gpu.network_bytes_per_s / 1e9:g} GB/s a GPU"
    keys = [item.partition("=")[0] for item in variants[0].overrides]
    models = list(dict.fromkeys(model for variant in variants for model in variant.not_hidden))
    waits = [f"{model} waits" for model in models]
    title = f"simulated step, {cluster.nodes} x {cluster.gpus_per_node} {gpu.name}, {network}"
    table = _number_table(title, *keys, "step, s", "tokens/s", "MFU", *waits, "fits")
    table.caption = "waits: share of the step that is this model's communication, not hidden by computation"
    for variant in variants:
        values = [escape(item.partition("=")[2]) for item in variant.overrides]
        numbers = (f"{variant.step_s:.3f}", f"{variant.tokens_per_s:,.0f}", f"{variant.mfu:.1%}")
        shares = [f"{variant.not_hidden[model]:.1%}" if model in variant.not_hidden else "-" for model in models]
        table.add_row(*values, *numbers, *shares, "yes" if variant.fits else "no")
    return table


def _clusters(points: Sequence[LayoutPoint]) -> Iterator[tuple[tuple[float, int, str], list[LayoutPoint]]]:
    for cluster, row in groupby(points, lambda point: (point.link_bytes_per_s, point.gpus, point.quantize)):
        yield cluster, list(row)


def draw_scaling(curves: Sequence[Curve], plan: Plan, path: Path) -> None:
    """Draw throughput and MFU over the number of GPUs; hollow points do not fit the memory. Needs matplotlib."""
    figure = _new_figure("--scaling", path, width=11)
    left, right = figure.subplots(1, 2)
    for number, curve in enumerate(curves):
        fits = [point.fits for point in curve.points]
        gpus = [point.gpus for point in curve.points]
        _draw_line(left, gpus, [point.tokens_per_s / 1e3 for point in curve.points], fits, curve.name, number)
        _draw_line(right, gpus, [100 * point.mfu for point in curve.points], fits, curve.name, number)
    weak = curves[-1].points
    ideal = [weak[0].tokens_per_s / 1e3 * point.gpus / weak[0].gpus for point in weak]
    left.plot([point.gpus for point in weak], ideal, color="#666666", linestyle=":", label="in proportion")
    left.set_yscale("log")
    left.set_ylabel("throughput, thousand tokens/s")
    right.set_ylim(bottom=0)
    right.set_ylabel("model FLOPs utilisation, % of the peak")
    for axes in (left, right):
        _gpu_axis(axes, [point.gpus for curve in curves for point in curve.points])
        tidy(axes, "both")
    left.legend(frameon=False, fontsize=9)
    figure.suptitle(f"{_title(plan)} (hollow: does not fit)")
    _save(figure, "--scaling", path)


def draw_layouts(points: Sequence[LayoutPoint], plan: Plan, path: Path) -> None:
    """Draw tokens/s a GPU over the number of GPUs, a panel for each network; hollow points do not fit the memory.

    Drawn are the points with the plan's own `teacher.quantize`. Needs matplotlib.
    """
    points = [point for point in points if plan.config.teacher and point.quantize == plan.config.teacher.quantize]
    links = list(dict.fromkeys(point.link_bytes_per_s for point in points))
    names = list(dict.fromkeys(point.name for point in points))
    figure = _new_figure("--layouts", path, width=12)
    panels = figure.subplots(1, len(links), sharey=True)
    for axes, link in zip(panels, links, strict=True):
        for number, name in enumerate(names):
            line = [point for point in points if point.name == name and point.link_bytes_per_s == link]
            gpus, speeds = [point.gpus for point in line], [point.tokens_per_s_per_gpu for point in line]
            _draw_line(axes, gpus, speeds, [point.fits for point in line], name, number)
        _gpu_axis(axes, [point.gpus for point in points], rotation=45)
        axes.set_title(f"network of {link / 1e9:g} GB/s a GPU", fontsize=10)
        tidy(axes)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("tokens/s a GPU")
    handles, labels = panels[0].get_legend_handles_labels()
    title = f"{_title(plan)}; teacher.shard_within and micro_batches_per_pass (hollow: does not fit)"
    figure.legend(handles, labels, loc="outside upper left", ncols=5, title=title, frameon=False, alignment="left")
    _save(figure, "--layouts", path)


def _new_figure(option: str, path: Path, width: float) -> Figure:
    """Make an empty figure. Raises ConfigError, naming the option, where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ConfigError(f"{option} {path}: matplotlib is missing: pip install matplotlib, or leave the option out")
    # Only here: everything else works without matplotlib, which not every machine has.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 4.6), layout="constrained")


def _draw_line(
    axes: Axes, gpus: Sequence[int], values: Sequence[float], fits: Sequence[bool], label: str, number: int
) -> None:
    """Draw one series over the number of GPUs, hollow where it does not fit; `number` chooses its style."""
    style, shape = line_style(number), marker(number)
    axes.plot(gpus, values, label=label, linewidth=1.6, marker=shape, markersize=6, **style)
    for x, y, fit in zip(gpus, values, fits, strict=True):
        if not fit:
            axes.plot(x, y, marker=shape, color=style["color"], markerfacecolor="white", zorder=3)


def _gpu_axis(axes: Axes, gpus: Sequence[int], rotation: float = 0) -> None:
    ticks = sorted(set(gpus))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=rotation)
    axes.set_xlabel("number of GPUs")


def _title(plan: Plan) -> str:
    return f"{plan.config.name}: simulated step, {plan.cluster.gpu.name}, {plan.cluster.gpus_per_node} a node"


def _save(figure: Figure, option: str, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option} {path}: cannot be written: {error}") from error
