"""A run's decisions on its mixture, taken again from its ledger: they must come out equal; also by another controller.

The ledger's measurements are the input, so another controller is only compared on the perplexities of this run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ddk_ds.drawing import Array, tidy
from ddk_ds.errors import CheckpointError, DataError
from ddk_ds.mixture.decide import Controller, Decision, decide
from ddk_ds.mixture.exhaustion import due_samples, largest_remainder
from ddk_ds.mixture.training_losses import Means
from ddk_ds.run_files import UNREADABLE, check_end, complete_files, is_finished, read_events, read_ledger, read_summary


@dataclass(frozen=True)
class RecordedDecision:
    """One decision of the ledger and its inputs; vectors (N,) are in the order of the domains."""

    interval: int
    step: int
    student_ppl: Array
    teacher_ppl: Array | None
    decision: Decision
    asked: tuple[int, ...]
    """Samples of each domain that are due by the proportions."""
    counts: tuple[int, ...]
    """Samples of each domain that are drawn."""
    owed: tuple[float, ...]
    """Samples of each domain that are due after the interval."""
    tokens: tuple[int, ...] = ()
    """Tokens of each domain that the run had trained on before the interval."""
    training: Means | None = None
    """Losses of the training samples of the interval before; None if they were not measured."""


@dataclass(frozen=True)
class RecordedRun:
    """The decisions of a run, and what its controller knew from the start."""

    domains: list[str]
    decisions: list[RecordedDecision]
    train_tokens: dict[str, int]
    """Size of each domain."""
    schedule: Any
    """Content of `mixture.schedule_file`, or None."""
    unreadable: list[str] = field(default_factory=list)
    """A text about each damaged line of events.jsonl."""


def read_recorded_run(run_dir: Path) -> RecordedRun:
    """Read the decisions on a run's mixture, with their inputs, from the ledger and the events in its directory.

    Raises CheckpointError if no interval has begun, or if an older version wrote the files.
    """
    ledger = read_ledger(run_dir)
    if is_finished(run_dir):
        check_end(run_dir, ledger, read_summary(run_dir)["steps"])
    records = [record for record in ledger if record["kind"] == "interval"]
    if not records:
        raise CheckpointError(f"{run_dir / 'ledger.jsonl'}: no interval has begun yet")
    events = read_events(run_dir)
    start = next((event["mixture"] for event in events if "mixture" in event), None)
    if start is None:
        raise CheckpointError(
            f"{run_dir / 'events.jsonl'}: no start event has the sizes of the domains: it is damaged, or an older "
            "version wrote it; take the file from a copy"
        )
    if "owed" not in records[0]:
        raise CheckpointError(
            f"{run_dir / 'ledger.jsonl'}: its intervals do not say what is owed: an older version wrote it; replay it "
            "with that version"
        )
    with complete_files(run_dir):
        domains = list(records[0]["proportions"])
        decisions = [_recorded_decision(record, domains) for record in records]
    unreadable = [event["text"] for event in events if event["event"] == UNREADABLE]
    return RecordedRun(domains, decisions, start["train_tokens"], start["schedule"], unreadable)


def _recorded_decision(record: dict[str, Any], domains: Sequence[str]) -> RecordedDecision:
    def vector(key: str) -> list[Any]:
        return [] if record[key] is None else [record[key][name] for name in domains]

    return RecordedDecision(
        interval=record["interval"],
        step=record["step"],
        student_ppl=np.array(vector("student_ppl")),
        teacher_ppl=None if record["teacher_ppl"] is None else np.array(vector("teacher_ppl")),
        decision=Decision(
            vector("proportions"), vector("smoothed_ppl"), vector("log_proportions"), record.get("controller_memory")
        ),
        asked=tuple(vector("asked")),
        counts=tuple(vector("counts")),
        owed=tuple(vector("owed")),
        tokens=tuple(vector("domain_tokens")),
        training=[vector("training_loss"), vector("training_kl")] if "training_loss" in record else None,
    )


@dataclass(frozen=True)
class Replay:
    """Result of a replay: the decisions that were taken again, and those that differ."""

    num_replayed: int
    """Number of decisions taken again: all, except the first of a fork, which continues from another run's decision."""
    unequal: list[int]
    """Intervals whose decision did not come out equal to the last bit."""


def replay(controller: Controller, recorded: Sequence[RecordedDecision]) -> Replay:
    """Take each decision again with the run's own controller, and return how many there are and which ones differ.

    Each starts from the recorded decision before it, so one difference does not cause others.
    """
    num_replayed, unequal = 0, []
    last: RecordedDecision | None = None
    for entry in recorded:
        if last is not None or entry.interval == 0:
            before = None if last is None else last.decision
            taken = _decide(controller, before, entry)
            num_replayed += 1
            if not _is_equal(entry, taken, () if last is None else last.owed):
                unequal.append(entry.interval)
        last = entry
    return Replay(num_replayed, unequal)


def _is_equal(entry: RecordedDecision, taken: Decision, owed: Sequence[float]) -> bool:
    """Return True if the decision, and the samples that it asks for, are the recorded ones to the last bit.

    `owed` (N,) is what was due before. Where a domain is at its cap, what is due afterwards depends on its limit, which
    the ledger does not have.
    """
    due = due_samples(taken.proportions, sum(entry.asked), owed)
    asked = tuple(largest_remainder(taken.proportions, sum(entry.asked), owed).tolist())
    capped = entry.counts != entry.asked
    still_owed = tuple((due - np.array(entry.counts)).tolist())
    return taken == entry.decision and asked == entry.asked and (capped or still_owed == entry.owed)


def decide_otherwise(controller: Controller, recorded: Sequence[RecordedDecision]) -> list[Decision]:
    """Return the decisions of another controller, each continuing its own last one; a fork's first is the recorded one.

    Raises DataError where the controller needs a teacher and the run has none.
    """
    decisions: list[Decision] = []
    for entry in recorded:
        if not decisions and entry.interval > 0:
            decisions.append(entry.decision)
            continue
        if controller.uses_teacher and entry.teacher_ppl is None:
            raise DataError(f"controller {controller.name} compares with a teacher, and this run has none")
        last = decisions[-1] if decisions else None
        decisions.append(_decide(controller, last, entry))
    return decisions


def _decide(controller: Controller, last: Decision | None, entry: RecordedDecision) -> Decision:
    """Return the decision of a controller on the measurements of a recorded one."""
    return decide(
        controller,
        last,
        entry.student_ppl,
        entry.teacher_ppl,
        interval=entry.interval,
        step=entry.step,
        tokens=sum(entry.tokens),
        training=entry.training,
    )


def mixture_table(run: RecordedRun, other: Sequence[Decision], overrides: str) -> Table:
    """Make the table of each domain's share of the samples, in the run and by the other decisions."""
    own = [entry.decision for entry in run.decisions]
    own_shares, other_shares = (_mean_proportions(run.decisions, decisions) for decisions in (own, other))
    table = Table(title=f"mixture as run, and with {overrides}", title_justify="left")
    table.add_column("domain")
    for heading in ("samples, as run", "would be", "last interval, as run", "would be"):
        table.add_column(heading, justify="right")
    for place, name in enumerate(run.domains):
        last = own[-1].proportions[place], other[-1].proportions[place]
        table.add_row(name, *(f"{value:.1%}" for value in (own_shares[place], other_shares[place], *last)))
    return table


def _mean_proportions(recorded: Sequence[RecordedDecision], decisions: Sequence[Decision]) -> Array:
    """Return the mean proportions (N,) of the decisions, weighted by the samples of each recorded interval."""
    samples = np.array([sum(entry.asked) for entry in recorded], np.float64)
    return samples @ np.array([decision.proportions for decision in decisions]) / samples.sum()


def replay_json(
    run: RecordedRun, replayed: Replay, other: Sequence[Decision] | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """Return every decision as plain JSON values; `other` are those of another controller, if one was tried."""
    rows: list[dict[str, Any]] = []
    for place, entry in enumerate(run.decisions):
        equal = entry.interval not in replayed.unequal
        row: dict[str, Any] = {"interval": entry.interval, "step": entry.step, "equal": equal}
        row["proportions"] = dict(zip(run.domains, entry.decision.proportions, strict=True))
        if other is not None:
            row["otherwise"] = dict(zip(run.domains, other[place].proportions, strict=True))
        rows.append(row)
    return {"unequal": replayed.unequal, "overrides": list(overrides), "intervals": rows}


def draw_replay(path: Path, run: RecordedRun, other: Sequence[Decision] | None, overrides: str) -> None:
    """Draw each domain's proportion over the steps to `path`: in the run, and by the `other` decisions if given.

    `overrides` is the legend's text for the other decisions. Needs matplotlib.
    """
    # Only here: the check needs no picture.
    from matplotlib.figure import Figure

    columns = min(5, len(run.domains))
    rows = -(-len(run.domains) // columns)
    figure = Figure(figsize=(2.4 * columns + 0.6, 2.0 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    steps = [entry.step for entry in run.decisions]
    for place, (name, axes) in enumerate(zip(run.domains, panels, strict=False)):
        proportions = [entry.decision.proportions[place] for entry in run.decisions]
        axes.plot(steps, proportions, color="black", marker="o", markersize=3, drawstyle="steps-post", label="as run")
        if other is not None:
            style: dict[str, Any] = {"color": "#D55E00", "marker": "s", "markersize": 3, "linestyle": "--"}
            proportions = [decision.proportions[place] for decision in other]
            axes.plot(steps, proportions, drawstyle="steps-post", label=overrides, **style)
        axes.set_title(name, fontsize=9)
        tidy(axes, "both")
    for axes in panels[len(run.domains) :]:
        axes.set_visible(False)
    panels[0].set_ylim(bottom=0)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("proportion of the samples", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
