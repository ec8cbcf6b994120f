"""A run on one screen of a terminal, from the end of its ledger and its other files alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ddk_ds.config import Config, load_run_config
from ddk_ds.config.run_config import interval_ends
from ddk_ds.errors import CheckpointError, UserError
from ddk_ds.remaining_time import RECENT_STEPS, RemainingTime
from ddk_ds.report.run_progress import State, duration, expected_steps, run_state
from ddk_ds.run_files import UNREADABLE, check_end, complete_files, read_events, read_ledger_end, read_summary

_COLOURS = {"running": "green", "finished": "green", "silent": "yellow", "interrupted": "yellow"}
_BAR = 20
_ALARMS = 2
_PARTS = {
    "data": ("data_s",),
    "ranks": ("sync_s",),
    "teacher": ("teacher_s",),
    "forward": ("forward_s",),
    "head": ("head_s",),
    "backward": ("backward_s",),
    "gathers": ("teacher_gather_s", "gather_s"),
    "reduce": ("reduce_s",),
    "optimizer": ("optimizer_s",),
}
"""Keys of the ledger's clock, by the word that the screen shows."""
_SHOWN_PARTS = 6
OTHER_LINES = 13
"""Lines of the screen without the domains' own."""


@dataclass(frozen=True)
class Surroundings:
    """Facts about a run that are not in its ledger."""

    now_s: float
    """Seconds since 1970."""
    checkpoint: tuple[int, float, int] | None
    """Step, time of writing (seconds since 1970) and bytes of the newest complete checkpoint; None if there is none."""
    damaged: Sequence[str]
    """Names of newer checkpoints that are not complete."""
    disk_free_bytes: int


def screen(run_dir: Path, around: Surroundings, max_domains: int | None = None) -> Group:
    """Return the screen of a run. Raises CheckpointError if the directory holds no run, or a damaged one."""
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir}: there is no such directory")
    if not (run_dir / "events.jsonl").is_file():
        raise CheckpointError(f"{run_dir}: not begun: no events.jsonl yet")
    events = read_events(run_dir)
    records = []
    if (run_dir / "ledger.jsonl").is_file():
        records = read_ledger_end(run_dir, steps=RECENT_STEPS, measurements=2)
    with complete_files(run_dir):
        state = run_state(run_dir, events, records, around.now_s)
        if not records:
            raise CheckpointError(f"{run_dir}: nothing is measured yet in ledger.jsonl: {state.text}")
        if state.kind == "finished":
            check_end(run_dir, records, read_summary(run_dir)["steps"])
        return Group(*_lines(run_dir, state, events, records, around, max_domains))


def _lines(
    run_dir: Path,
    state: State,
    events: Sequence[dict[str, Any]],
    records: Sequence[dict[str, Any]],
    around: Surroundings,
    max_domains: int | None,
) -> Iterator[RenderableType]:
    measurements = [record for record in records if record["kind"] != "step"]
    steps = [record for record in records if record["kind"] == "step"]
    colour = _COLOURS.get(state.kind, "red")
    yield _line(f"[bold]{escape(run_dir.resolve().name)}[/]  [{colour}]{escape(state.text)}[/]")
    ranks = _counted(_ranks(events), "rank")
    yield _line(f"last sign of life {duration(state.age_s)} ago, {_counted(_starts(events), 'start')}, {ranks}")
    yield _progress(run_dir, events, records, finished=state.kind == "finished")
    if steps:
        yield from _numbers(steps)
    yield _line(_checkpoint(around))
    for name in around.damaged:
        yield _line(f"[red]checkpoints/{name} is damaged, or of another version: an older one is used[/]")
    if measurements:
        yield _domains(measurements, steps, max_domains)
    for text in _alarms(events):
        yield _line(f"[red]{escape(text)}[/]")


def _line(markup: str) -> Text:
    text = Text.from_markup(markup)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _starts(events: Sequence[dict[str, Any]]) -> int:
    return sum(event["event"] in ("start", "resume", "fork", "phase") for event in events)


def _ranks(events: Sequence[dict[str, Any]]) -> int:
    return next((int(event["world_size"]) for event in reversed(events) if "world_size" in event), 0)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _seconds_left(
    config: Config, total: int, events: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]
) -> float | None:
    """Estimate the time to the run's end; None before the first step."""
    remaining = RemainingTime(total, interval_ends(config.mixture, total))
    steps = [record for record in records if record["kind"] == "step"]
    if not steps:
        return None
    for record in steps:
        remaining.step_took(record["clock"]["step_s"])
    for record in records:
        if record["kind"] != "step":
            remaining.measurement_took(record["clock"].get("measure_s", 0.0), record["step"])
    for event in events:
        if event["event"] == "checkpoint":
            remaining.checkpoint_took(event.get("seconds", 0.0))
    return remaining.seconds(records[-1]["step"])


def _progress(
    run_dir: Path, events: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], *, finished: bool
) -> RenderableType:
    step, total, left_s, fault = records[-1]["step"], None, None, ""
    try:
        config = load_run_config(run_dir)
        total = expected_steps(config, events)
        left_s = None if total is None else _seconds_left(config, total, events, records)
    except UserError:  # its end is not known
        fault = " (config.yaml is missing, damaged or of another version)"
    if total is None or finished:
        return _line(f"step {step:,}" + ("" if finished else f" of ?{fault}"))
    grid = Table.grid(padding=(0, 2))
    eta = f"ETA {duration(left_s)}" if left_s is not None else "ETA ?"
    bar = ProgressBar(total=max(1, total), completed=step, width=24)
    grid.add_row(f"step {step:,} of {total:,}", bar, f"{step / max(1, total):.1%}", eta)
    return grid


def _numbers(steps: Sequence[dict[str, Any]]) -> Iterator[Text]:
    last = steps[-1]
    shown = [f"interval {last['interval']}", f"loss {_number(last['loss'])}"]
    if last["kl"]:
        shown.append(f"CE {_number(last['ce'])}  KL {_number(last['kl'])}")
    shown += [f"gradient {_number(last['grad_norm'])}", f"rate {last['learning_rate']:.2e}"]
    yield _line("  ".join(shown))
    clocks = [record["clock"] for record in steps]
    tokens = sum(sum(record["domain_tokens"]) for record in steps)
    seconds = max(1e-9, sum(clock["step_s"] for clock in clocks))
    parts = {
        word: sum(clock.get(key, 0.0) for clock in clocks for key in keys) / seconds for word, keys in _PARTS.items()
    }
    largest = sorted(parts, key=lambda word: parts[word], reverse=True)[:_SHOWN_PARTS]
    parts_text = " ".join(f"{word} {parts[word]:.0%}" for word in largest if parts[word] >= 0.005)
    memory = clocks[-1].get("peak_memory_gb")
    peak = "" if memory is None else f", peak memory {memory:.1f} GB"
    pace = f"{tokens / seconds:,.0f} tokens/s, {seconds / len(steps):.3g} s a step"
    yield _line(f"{pace} (last {_counted(len(steps), 'step')}){peak}")
    yield _line(f"step time: {parts_text}")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _checkpoint(around: Surroundings) -> str:
    free = f"disk free {around.disk_free_bytes / 1e9:,.1f} GB"
    if around.checkpoint is None:
        return f"no checkpoint yet; {free}"
    step, written_s, num_bytes = around.checkpoint
    age = duration(max(0.0, around.now_s - written_s))
    return f"checkpoint of step {step:,}, {age} old, {num_bytes / 1e9:,.2f} GB; {free}"


def _domains(
    measurements: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]], max_domains: int | None
) -> RenderableType:
    last, before = measurements[-1], measurements[-2] if len(measurements) > 1 else None
    key, heading = ("student_ppl", "perplexity") if last["ratio"] is None else ("ratio", "ratio")
    planned: dict[str, float] = next(
        (record["proportions"] for record in reversed(measurements) if record["proportions"]), {}
    )
    names = list(last[key])
    largest = max([*planned.values(), 1e-9])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column("domain", no_wrap=True, max_width=22)
    table.add_column("mixture", no_wrap=True)
    for title in ("share", heading, "change"):
        table.add_column(title, justify="right", no_wrap=True)
    shown = names
    if max_domains is not None and len(names) > max_domains:
        shown = sorted(names, key=lambda name: -last[key][name])[: max(1, max_domains - 1)]
    for name in shown:
        share = planned.get(name, 0.0)
        bar = ProgressBar(total=largest, completed=share, width=_BAR, complete_style="cyan", finished_style="cyan")
        change = "" if before is None else _change(last[key][name] - before[key][name])
        table.add_row(escape(name), bar, f"{share:.1%}", f"{last[key][name]:.3f}", change)
    if len(shown) < len(names):
        table.add_row(f"and {len(names) - len(shown)} more, all lower", "", "", "", "")
    table.add_section()
    mean = sum(last[key].values()) / len(names)
    moved = "" if before is None else _change(mean - sum(before[key].values()) / len(names))
    table.add_row(f"mean, at step {last['step']:,}", "", "", f"{mean:.3f}", moved)
    return table


def _change(value: float) -> str:
    colour = "green" if value < 0 else "yellow"
    return f"[{colour}]{value:+.3f}[/]"


def _alarms(events: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each of the last alarms and faults."""
    kinds = ("alarm", "warning", "checkpoint_failed", "roll_back", "skipped", "damaged", UNREADABLE)
    last = [event for event in events if event["event"] in kinds][-_ALARMS:]
    return [
        f"{event['event']} at step {event.get('step', '?')}: "
        f"{event.get('text') or event.get('reason') or event.get('path') or 'no finite gradient'}"
        for event in last
    ]
