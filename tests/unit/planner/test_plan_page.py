"""The tables and pictures of a plan: the numbers in their cells and on their axes, each by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.table import Table

from ddk_ds.planner import plan_page
from ddk_ds.planner.advice import Advice
from ddk_ds.planner.faster import Faster
from ddk_ds.planner.known_points import Point
from ddk_ds.planner.run_plan import Plan
from ddk_ds.planner.simulations import Curve, LayoutPoint, ScalingPoint, Variant
from ddk_ds.planner.step_time import Step, TeacherGathers
from tests.unit.planner.test_planner_by_hand import CLUSTER, config_of, planned


def rows_of(table: Any) -> list[tuple[str, ...]]:
    assert isinstance(table, Table)
    return list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))


def words_of(table: Any) -> dict[str, str]:
    """Return the second cell of each row by the first."""
    return {row[0]: row[1] for row in rows_of(table)}


@pytest.fixture
def plan() -> Plan:
    """A plan of round numbers: 4 GPUs with 1e12 FLOP/s each at an MFU of 0.25."""
    plan = planned(config_of())
    memory = replace(
        plan.memory,
        device_parts={"weights": 2 * 10**9, "passes": 1234 * 10**9},
        host_parts={"copy": 10**8},
        activations={"with checkpointing": 5 * 10**8},
        device_bytes=30 * 10**9,
        usable_bytes=90 * 10**9,
        host_bytes=4 * 10**9,
        max_micro_batch=9,
        max_dividing=6,
    )
    checkpoints = replace(
        plan.checkpoints,
        num_bytes=10**9,
        kept_bytes=6 * 10**9,
        export_bytes=5 * 10**8,
        write_s=7.0,
        pause_s=0.5,
        apart_s=20.0,
    )
    flops = replace(plan.flops, cpt=1e15, kd=3e15, evaluation=6e12, own=4e15)
    step = Step({"one": 0.75, "two": 0.25}, tokens=2400, flops=1e12, peak_flop_per_s=4e12)
    gathers = TeacherGathers(num_bytes=5e9, seconds=0.75, compute_s=0.25)
    place = LayoutPoint(1e9, 4, "none", "node", 3, 700.0, 35 * 10**9, fits=True, several=True)
    plan = replace(plan, gathers=gathers, better_place=place, step=step, hours=1234.5, advice=[])
    return replace(plan, memory=memory, checkpoints=checkpoints, flops=flops)


def test_the_tables_of_a_plan(plan: Plan) -> None:
    answer, memory, flops, time, step, _, assumed = plan_page.plan_tables(plan)
    assert str(answer).split("\n") == [
        "fits: 30.00 of 90.00 GB that can be planned with on each round; largest micro-batch that fits: 9; that also "
        "divides a GPU's samples: 6",
        "1,234.5 hours, 4,938 GPU-hours for 0.00 B tokens on 2 x 2 GPUs: 52,632 tokens/s, by an assumed MFU of 25.0%",
        "the simulated step (below) has an MFU of 25.0%, which gives 0.0 hours: a ceiling, because in it nothing waits "
        "for data or a slow rank, and matmuls always reach 50% of the peak; --tokens-per-s-per-gpu takes what a run of "
        "yours has shown, in place of --mfu",
        "teacher: a step gathers 5.00 GB of its weights on each GPU, 0.75 s on the links, and computes 0.25 s with "
        "them: teacher.shard_within=node teacher.micro_batches_per_pass=3 gives 2,800 tokens/s instead of 2,400 "
        "(simulated), with 35.00 GB on a device",
        "disk: 6.50 GB for checkpoints and export, 1.00 GB of shards",
        "",
    ]
    assert rows_of(memory) == [
        ("weights", "2.00"),
        ("passes", "1,234.00"),
        ("peak (a pass's parts are freed before the update)", "30.00"),
        ("activations with checkpointing", "0.50"),
        ("host, for each device: copy", "0.10"),
        ("host of a node, total", "4.00"),
    ]
    assert rows_of(flops) == [
        ("CPT", "1,000"),
        ("KD", "3,000"),
        ("DDK", "3,006"),
        ("the controller's measurements in it", "6"),
        ("this run (ddk, measurements included)", "4,000"),
        ("KD over CPT", "3.000"),
        ("DDK over KD", "1.0020"),
    ]
    times = words_of(time)
    # 1e12 FLOP/s: 1,000, 3,000 and 3,006 s.
    assert [times[f"hours of {name} at the same MFU"] for name in ("CPT", "KD", "DDK")] == ["0.3", "0.8", "0.8"]
    assert (times["tokens/s"], times["hours"], times["GPU-hours"]) == ("52,632", "1,234.5", "4,938")
    assert (times["shards, GB"], times["reading shards, MB/s, all nodes"]) == ("1.00", "0.211")
    assert (times["one checkpoint, GB"], times["5 kept and one being written, GB"]) == ("1.00", "6.00")
    assert (times["writing a checkpoint, s"], times["training waits for a checkpoint, s"]) == ("7.0", "0.50")
    assert (times["from one checkpoint to the next, s"], times["exported student, GB"]) == ("20", "0.50")
    assert isinstance(time, Table) and time.caption is None
    assert rows_of(step) == [
        ("one", "0.7500", "75.0%"),
        ("two", "0.2500", "25.0%"),
        ("step", "1.0000", ""),
        ("tokens/s", "2,400", ""),
        ("MFU (an upper bound)", "25.0%", ""),
    ]
    assert [column.justify for column in step.columns] == ["left", "right", "right"]  # type: ignore[union-attr]
    assert str(assumed).startswith("assumed:\n- GPU: 1 TFLOP/s")


def test_what_a_plan_warns_of(plan: Plan) -> None:
    slow = replace(plan, checkpoints=replace(plan.checkpoints, write_s=20.5))
    assert "raise checkpoint.every_steps" in str(plan_page._time(slow).caption)
    same = replace(plan, memory=replace(plan.memory, max_dividing=9))
    assert "largest micro-batch that fits: 9\n" in plan_page._answer(same)
    fast = plan_page._answer(replace(plan, mfu=0.26))
    assert "hardly a run is faster, so the assumed 26.0% is too high" in fast and "a ceiling" not in fast
    measured = plan_page._answer(replace(plan, measured=True))
    assert "by the measured speed, an MFU of 25.0%" in measured and "in place of --mfu" not in measured
    assert "so the measured 26.0% is" in plan_page._answer(replace(plan, mfu=0.26, measured=True))
    full = replace(plan.memory, device_bytes=91 * 10**9, fits=False)
    assert plan_page._answer(replace(plan, memory=full)).startswith("[bold red]does NOT fit[/]: 91.00 of 90.00 GB")
    assert "GPU-hours[/] if it did for" in plan_page._answer(replace(plan, memory=full))
    advice = [
        Advice("a=1", nodes=1, device_bytes=95 * 10**9, host_bytes=10**9, fits=False, price="time"),
        Advice("b=2", nodes=1, device_bytes=85 * 10**9, host_bytes=2 * 10**9, fits=True, price="room"),
    ]
    _, table, *_ = plan_page.plan_tables(replace(plan, memory=full, advice=advice, faster=[]))
    assert rows_of(table) == [("a=1", "95.00", "no", "1.00", "time"), ("b=2", "85.00", "[green]yes[/]", "2.00", "room")]
    assert isinstance(table, Table) and table.caption is None and table.columns[-1].justify == "left"
    assert "none of them fits" in str(plan_page._advice(replace(plan, advice=advice[:1])).caption)
    assert plan.better_place is not None
    for passes, text in ((1, "node[/]"), (2, "node teacher.micro_batches_per_pass=2[/]")):
        place = replace(plan.better_place, micro_batches_per_pass=passes)
        assert f"teacher.shard_within={text}" in plan_page._answer(replace(plan, better_place=place))
    none = replace(plan, flops=replace(plan.flops, kd=None))
    assert [row[1] for row in rows_of(plan_page._flops(none))] == ["1,000", "-", "-", "-", "4,000"]
    assert "hours of KD at the same MFU" not in words_of(plan_page._time(none))


def test_faster_steps_name_the_best(plan: Plan) -> None:
    some = [
        Faster("a=1", 0.8, 3000.0, 1.25, 2 * 10**9, "rounded otherwise"),
        Faster("b=2", 0.5, 4800.0, 2.0, 10**9, "another teacher"),
    ]
    *_, table, _ = plan_page.plan_tables(replace(plan, faster=some))
    assert rows_of(table) == [
        ("a=1", "0.8000", "3,000", "1.25", "2.00", "rounded otherwise"),
        ("b=2", "0.5000", "4,800", "2.00", "1.00", "another teacher"),
    ]
    assert isinstance(table, Table) and "no GPU has measured" in str(table.title)
    assert str(table.caption).startswith("b=2 is the fastest that fits, 2.00 times the configured step's speed")
    slow = [replace(one, times=1.05) for one in some]
    assert "none of them makes the step 5% faster" in str(plan_page._faster(replace(plan, faster=slow)).caption)
    assert len(list(plan_page.plan_tables(replace(plan, faster=[])))) == 6


CURVES = [
    Curve(
        "strong", [ScalingPoint(2, 64, 8, 1.5, 3000.0, 0.25, True), ScalingPoint(1024, 64, 1, 0.5, 9e6, 0.125, False)]
    ),
    Curve("weak", [ScalingPoint(2, 64, 8, 1.5, 3000.0, 0.25, True), ScalingPoint(4, 128, 8, 1.5, 5000.0, 0.2, True)]),
]
LAYOUTS = [
    LayoutPoint(link, gpus, form, within, per_pass, speed * (1 if form == "none" else 1.5), 5, fits, several)
    for link in (3e9, 25e9)
    for gpus in (8, 1024)
    for form in ("none", "fp8")
    for within, per_pass, speed, fits, several in (
        ("world", 1, link / 1e8 + gpus, True, False),
        ("world", 4, link / 1e8 + 2 * gpus, gpus == 8, True),
    )
]


def test_tables_of_simulations() -> None:
    assert rows_of(plan_page.scaling_table(CURVES)) == [
        ("strong", "2", "8", "1.500", "3,000", "25.0%", "yes"),
        ("strong", "1,024", "1", "0.500", "9,000,000", "12.5%", "no"),
        ("weak", "2", "8", "1.500", "3,000", "25.0%", "yes"),
        ("weak", "4", "8", "1.500", "5,000", "20.0%", "yes"),
    ]
    table = plan_page.layouts_table(LAYOUTS)
    heads = ["GB/s", "GPUs", "quantize", "world", "world,\nn a pass", "advised", "over none"]
    assert [str(column.header) for column in table.columns] == heads
    assert rows_of(table) == [
        ("3", "8", "none", "38", "46", "world, 4 a pass", "-"),
        ("3", "8", "fp8", "57", "69", "world, 4 a pass", "+50%"),
        ("3", "1,024", "none", "1,054", "2,078 (no)", "world", "-"),
        ("3", "1,024", "fp8", "1,581", "3,117 (no)", "world", "+50%"),
        ("25", "8", "none", "258", "266", "world, 4 a pass", "-"),
        ("25", "8", "fp8", "387", "399", "world, 4 a pass", "+50%"),
        ("25", "1,024", "none", "1,274", "2,298 (no)", "world", "-"),
        ("25", "1,024", "fp8", "1,911", "3,447 (no)", "world", "+50%"),
    ]
    assert "no GPU has measured 8 bits" in str(table.caption)
    two = [replace(one, micro_batches_per_pass=2) for one in LAYOUTS[:2]]
    assert rows_of(plan_page.layouts_table(two))[0][-2] == "world, 2 a pass"
    nowhere = [replace(one, fits=False) for one in LAYOUTS[:2]]
    assert rows_of(plan_page.layouts_table(nowhere))[0][-2:] == ("none fits", "-")
    points = [
        Point("a", 8, 100.0, 90.0, "book"),
        Point("b", 1024, 2000.0, 3000.0, "page"),
        Point("c", 8, 100.0, 100.0, "book"),
    ]
    table = plan_page.known_points_table(points)
    assert rows_of(table) == [
        ("a", "8", "100.0", "90.0", "-10%", "1"),
        ("b", "1,024", "2,000.0", "3,000.0", "+50%", "2"),
        ("c", "8", "100.0", "100.0", "+0%", "1"),
    ]
    assert table.caption == "1: book\n2: page"


def test_a_table_of_variants() -> None:
    variants = [
        Variant(("x=1", "y=a"), 1.5, 3000.0, 0.25, {"teacher": 0.125, "student": 0.5}, True),
        Variant(("x=2", "y=a"), 0.5, 9000.0, 0.125, {"student": 0.25}, False),
    ]
    table = plan_page.variants_table(variants, CLUSTER)
    headers = ["x", "y", "step, s", "tokens/s", "MFU", "teacher waits", "student waits", "fits"]
    assert [str(column.header) for column in table.columns] == headers
    assert rows_of(table) == [
        ("1", "a", "1.500", "3,000", "25.0%", "12.5%", "50.0%", "yes"),
        ("2", "a", "0.500", "9,000", "12.5%", "-", "25.0%", "no"),
    ]
    assert table.title == "simulated step, 2 x 2 round, network of 1 GB/s a GPU"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, which are kept from the disk."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: figures.append(self))
    return figures


def lines_of(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Return the named lines of a panel: their numbers of GPUs and their values."""
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in named}


def hollow_of(axes: Any) -> list[tuple[float, float]]:
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in hollow]


def test_a_picture_of_scaling(plan: Plan, drawn: list[Figure]) -> None:
    plan_page.draw_scaling(CURVES, plan, Path("none.png"))
    left, right = drawn[0].axes
    assert lines_of(left) == {
        "strong": ([2, 1024], [3.0, 9000.0]),
        "weak": ([2, 4], [3.0, 5.0]),
        "in proportion": ([2, 4], [3.0, 6.0]),  # as many tokens/s a GPU as on the fewest
    }
    assert lines_of(right) == {"strong": ([2, 1024], [25.0, 12.5]), "weak": ([2, 4], [25.0, 20.0])}
    assert (hollow_of(left), hollow_of(right)) == ([(1024, 9000.0)], [(1024, 12.5)])
    for axes in (left, right):
        assert axes.get_xscale() == "log" and axes.get_xticks().tolist() == [2, 4, 1024]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "4", "1024"]
    assert left.get_yscale() == "log" and right.get_ylim()[0] == 0
    legend = left.get_legend()
    assert legend is not None and [text.get_text() for text in legend.texts] == ["strong", "weak", "in proportion"]
    assert drawn[0].get_suptitle() == "by-hand: simulated step, round, 2 a node (hollow: does not fit)"


def test_a_picture_of_layouts(plan: Plan, drawn: list[Figure]) -> None:
    plan_page.draw_layouts(LAYOUTS, plan, Path("none.png"))
    slow, fast = drawn[0].axes
    assert lines_of(slow) == {"world": ([8, 1024], [38.0, 1054.0]), "world, n a pass": ([8, 1024], [46.0, 2078.0])}
    assert lines_of(fast) == {"world": ([8, 1024], [258.0, 1274.0]), "world, n a pass": ([8, 1024], [266.0, 2298.0])}
    assert hollow_of(slow) == [(1024, 2078.0)]
    assert [axes.get_title() for axes in (slow, fast)] == ["network of 3 GB/s a GPU", "network of 25 GB/s a GPU"]
    assert slow.get_ylim()[0] == 0 and slow.get_ylim() == fast.get_ylim()
    assert slow.get_ylabel() == "tokens/s a GPU" and fast.get_ylabel() == ""
    [legend] = drawn[0].legends
    assert [text.get_text() for text in legend.texts] == ["world", "world, n a pass"]
