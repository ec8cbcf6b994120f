"""Take a run's decisions on its mixture again: they must come out equal; and what other options would have decided.

python tools/replay.py runs/demo [alpha=0.3 controller=equal ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from ddk_ds.config import Config, load_config
from ddk_ds.errors import CheckpointError, DataError, UserError
from ddk_ds.files import write_text
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.decide import Controller, Decision, decide
from ddk_ds.mixture.exhaustion import largest_remainder
from ddk_ds.run_files import read_events, read_ledger
from ddk_ds.train.interval import read_schedule

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """What the ledger has of one decision; vectors (N,) are in the order of the domains."""

    number: int
    step: int
    student_ppl: Array
    teacher_ppl: Array | None
    decision: Decision
    asked: tuple[int, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 where a decision does not come out equal; 2 for an error that the user can mend."""
    options = _parse(arguments)
    try:
        return _replay(options, Console(soft_wrap=not sys.stdout.isatty(), highlight=False))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Take a run's decisions on its mixture again, also by other options.")
    parser.add_argument("run", type=Path, help="directory of a run, finished or not")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of section mixture to try instead")
    parser.add_argument("--picture", type=Path, help="write the mixture over time to this file (.png, .svg or .pdf)")
    parser.add_argument("--json", type=Path, help="write every decision to this file")
    return parser.parse_intermixed_args(arguments)


def _replay(options: argparse.Namespace, console: Console) -> int:
    names, intervals = read_intervals(options.run)
    config = load_config(options.run / "config.yaml")
    known = _known(options.run)
    ours = make_controller(config.mixture, known["train_tokens"], known["schedule"])
    again = [_again(ours, intervals, place) for place in range(len(intervals))]
    unequal = [
        one.number for one, taken in zip(intervals, again, strict=True) if taken is not None and not _equal(one, taken)
    ]
    num_replayed = sum(taken is not None for taken in again)
    console.print(f"{num_replayed - len(unequal)} of {num_replayed} decisions come out equal to the last bit")
    if num_replayed < len(intervals):
        console.print("the first one continues from a decision of the run that this one was forked from: not replayed")
    if unequal:
        console.print(f"NOT equal: intervals {', '.join(map(str, unequal))}; was the ledger or config.yaml edited?")
    other = None
    if options.overrides:
        other = _decided_otherwise(_other_controller(options, config, known), intervals)
        console.print(_table(names, intervals, other, " ".join(options.overrides)))
        console.print("by the same measurements: the student would have been another one, and so its perplexities")
    if options.picture is not None:
        _draw(options.picture, names, intervals, other, " ".join(options.overrides))
    if options.json is not None:
        write_text(options.json, json.dumps(_as_json(names, intervals, unequal, other, options.overrides), indent=1))
    return 1 if unequal else 0


def read_intervals(run_dir: Path) -> tuple[list[str], list[Interval]]:
    """The domains and the decisions of a run's ledger. Raises CheckpointError where there are none."""
    records = [record for record in read_ledger(run_dir) if record["kind"] == "interval"]
    if not records:
        raise CheckpointError(f"{run_dir / 'ledger.jsonl'}: no interval has begun yet")
    names = list(records[0]["proportions"])

    def vector(values: dict[str, float] | None) -> list[float]:
        return [] if values is None else [values[name] for name in names]

    intervals = [
        Interval(
            number=record["interval"],
            step=record["step"],
            student_ppl=np.array(vector(record["student_ppl"])),
            teacher_ppl=None if record["teacher_ppl"] is None else np.array(vector(record["teacher_ppl"])),
            decision=Decision(vector(record["proportions"]), vector(record["smoothed_ppl"])),
            asked=tuple(int(record["asked"][name]) for name in names),
        )
        for record in records
    ]
    return names, intervals


def _known(run_dir: Path) -> dict[str, Any]:
    """Sizes of the domains and content of a schedule, as the run's beginning noted them."""
    for event in read_events(run_dir):
        if "mixture" in event:
            found: dict[str, Any] = event["mixture"]
            return found
    raise CheckpointError(f"{run_dir / 'events.jsonl'}: no start with the sizes of domains: of an older version")


def _again(controller: Controller, intervals: list[Interval], place: int) -> Decision | None:
    """The decision at `place`, from the recorded one before it; None where that one is not in this ledger."""
    one = intervals[place]
    if place == 0 and one.number > 0:
        return None
    last = intervals[place - 1].decision if place else None
    return decide(controller, last, one.student_ppl, one.teacher_ppl, interval=one.number)


def _equal(one: Interval, taken: Decision) -> bool:
    """Whether the decision, and the samples that follow from it, are the recorded ones to the last bit."""
    return taken == one.decision and tuple(largest_remainder(taken.proportions, sum(one.asked)).tolist()) == one.asked


def _other_controller(options: argparse.Namespace, config: Config, known: dict[str, Any]) -> Controller:
    overrides = [f"mixture.{item.removeprefix('mixture.')}" for item in options.overrides]
    mixture = load_config(options.run / "config.yaml", overrides).mixture
    schedule = known["schedule"]
    if mixture.schedule_file != config.mixture.schedule_file:
        schedule = read_schedule(mixture.schedule_file)
    return make_controller(mixture, known["train_tokens"], schedule)


def _decided_otherwise(controller: Controller, intervals: list[Interval]) -> list[Decision]:
    """What the controller decides, each time from its own decision before. A fork begins with the recorded one."""
    decisions: list[Decision] = []
    for one in intervals:
        if not decisions and one.number > 0:
            decisions.append(one.decision)
            continue
        if controller.uses_teacher and one.teacher_ppl is None:
            raise DataError(f"controller {controller.name} compares with a teacher, which this run has not")
        last = decisions[-1] if decisions else None
        decisions.append(decide(controller, last, one.student_ppl, one.teacher_ppl, interval=one.number))
    return decisions


def _share(intervals: list[Interval], decisions: Sequence[Decision]) -> Array:
    """(N,) share of the run's samples that the decisions ask for."""
    samples = np.array([sum(one.asked) for one in intervals], np.float64)
    return samples @ np.array([decision.proportions for decision in decisions]) / samples.sum()


def _table(names: list[str], intervals: list[Interval], other: list[Decision], title: str) -> Table:
    recorded = [one.decision for one in intervals]
    was, would = _share(intervals, recorded), _share(intervals, other)
    table = Table(title=f"mixture as run, and with {title}", title_justify="left")
    table.add_column("domain")
    for heading in ("samples, as run", "would be", "last interval, as run", "would be"):
        table.add_column(heading, justify="right")
    for place, name in enumerate(names):
        last = recorded[-1].proportions[place], other[-1].proportions[place]
        table.add_row(name, *(f"{value:.1%}" for value in (was[place], would[place], *last)))
    return table


def _as_json(
    names: list[str], intervals: list[Interval], unequal: list[int], other: list[Decision] | None, overrides: list[str]
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for place, one in enumerate(intervals):
        row: dict[str, Any] = {"interval": one.number, "step": one.step, "equal": one.number not in unequal}
        row["proportions"] = dict(zip(names, one.decision.proportions, strict=True))
        if other is not None:
            row["otherwise"] = dict(zip(names, other[place].proportions, strict=True))
        rows.append(row)
    return {"unequal": unequal, "overrides": overrides, "intervals": rows}


def _draw(path: Path, names: list[str], intervals: list[Interval], other: list[Decision] | None, title: str) -> None:
    """A small plot for each domain: its proportion over the run as it was, and as it would have been."""
    # Only here: the check needs no picture.
    from matplotlib.figure import Figure

    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.4 * columns + 0.6, 2.0 * rows + 0.9), layout="constrained")
    plots = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    steps = [one.step for one in intervals]
    for place, (name, axes) in enumerate(zip(names, plots, strict=False)):
        run = [one.decision.proportions[place] for one in intervals]
        axes.plot(steps, run, color="black", marker="o", markersize=3, drawstyle="steps-post", label="as run")
        if other is not None:
            would = [decision.proportions[place] for decision in other]
            style: dict[str, Any] = {"color": "#D55E00", "marker": "s", "markersize": 3, "linestyle": "--"}
            axes.plot(steps, would, drawstyle="steps-post", label=title, **style)
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in plots[len(names) :]:
        axes.set_visible(False)
    plots[0].set_ylim(bottom=0)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("proportion of the samples", fontsize=9)
    handles, labels = plots[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    raise SystemExit(main())
