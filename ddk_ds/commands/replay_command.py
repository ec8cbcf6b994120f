"""Take a run's decisions on its mixture again, which must come out equal, and compare them with other options.

ddk replay runs/demo [alpha=0.3 controller=equal ...]
ddk replay runs/demo --what-if [--cache caches/teacher] [--page what_if.html]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ddk_ds.command_line import command_parser, parse, reports_user_errors
from ddk_ds.config import load_run_config
from ddk_ds.files import write_text
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.decide import Controller
from ddk_ds.report.replayed_decisions import (
    RecordedRun,
    Replay,
    decide_otherwise,
    draw_replay,
    mixture_table,
    read_recorded_run,
    replay,
    replay_json,
)


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if all decisions come out equal, 1 if one does not, 2 for an error that the user can mend."""
    options = _parse(arguments)
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
    run = read_recorded_run(options.run)
    replayed = replay(_controller(options.run, run, []), run.decisions)
    for line in (*run.unreadable, *_verdict(replayed, run)):
        console.print(line)
    if options.what_if:
        from ddk_ds.commands.what_if_work import show_what_if  # imports torch, for which a plain replay need not wait

        show_what_if(options, run, console)
        return 1 if replayed.unequal else 0
    other, overrides = None, " ".join(options.overrides)
    if options.overrides:
        other = decide_otherwise(_controller(options.run, run, options.overrides), run.decisions)
        console.print(mixture_table(run, other, overrides))
        console.print("from the same measurements: with another mixture the student's perplexities would differ too")
    if options.picture is not None:
        draw_replay(options.picture, run, other, overrides)
    if options.json is not None:
        write_text(options.json, json.dumps(replay_json(run, replayed, other, options.overrides), indent=1))
    return 1 if replayed.unequal else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, check=_not_together)
    parser.add_argument("run", type=Path, help="directory of a run, finished or not")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of section mixture to try instead")
    parser.add_argument("--picture", type=Path, help="write the mixture over time to this file (.png, .svg or .pdf)")
    parser.add_argument("--json", type=Path, help="write every decision to this file")
    parser.add_argument(
        "--what-if", action="store_true", help="show what every controller would have decided and drawn"
    )
    parser.add_argument("--cache", help="the teacher's cache for --what-if (default: the run's own)")
    parser.add_argument("--page", type=Path, help="write what --what-if shows to this HTML file")
    return parse(parser, arguments)


def _not_together(options: argparse.Namespace) -> str:
    if (options.cache or options.page) and not options.what_if:
        return "--cache and --page go with --what-if"
    if options.what_if and (options.picture or any(item.startswith("controller=") for item in options.overrides)):
        return "--what-if asks every controller and has its pictures in --page: leave --picture and controller= out"
    return ""


def _controller(run_dir: Path, run: RecordedRun, overrides: Sequence[str]) -> Controller:
    """Make the controller of the run's configuration, with other options of section mixture."""
    from ddk_ds.train.interval import read_schedule  # imports torch, for which --help should not wait

    own = load_run_config(run_dir)
    # Another controller may contradict the run's method (`ddk_equal`), which takes no part here.
    values = [f"method={'cpt' if own.teacher is None else 'kd'}", f"mixture.controller={own.mixture.controller}"]
    values += [f"loss.divergence={own.loss.divergence}"]
    values += [f"mixture.{item.removeprefix('mixture.')}" for item in overrides]
    mixture = load_run_config(run_dir, values).mixture
    other_file = mixture.schedule_file != own.mixture.schedule_file
    schedule = read_schedule(mixture.schedule_file) if other_file else run.schedule
    return make_controller(mixture, run.train_tokens, schedule)


def _verdict(replayed: Replay, run: RecordedRun) -> list[str]:
    num_equal = replayed.num_replayed - len(replayed.unequal)
    lines = [f"{num_equal} of {replayed.num_replayed} decisions come out equal to the last bit"]
    if replayed.num_replayed < len(run.decisions):
        lines.append("not replayed: the first decision, which continues from the run that this one was forked from")
    if replayed.unequal:
        intervals = ", ".join(map(str, replayed.unequal))
        lines.append(f"NOT equal: intervals {intervals}; was the ledger or config.yaml edited?")
    return lines
