"""Compare methods by runs from one starting student on the same number of tokens, with several seeds each.

    ddk compare --config my.yaml --methods cpt,kd,ddk --seeds 3 --out runs/compared [key=value ...]

The `deepspeed` launcher starts each run. Start the same command again to continue: finished runs are skipped. Leaves
comparison.json, comparison.md and comparison.png in --out (docs/comparing.md).
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ddk_ds.command_line import command_parser, parse, positive
from ddk_ds.comparison.comparison_jobs import METHODS, SUITES, ComparisonPlan, read_grid
from ddk_ds.comparison.method_stages import Job, RunInterrupted, run_job
from ddk_ds.config.suggestions import dashes_hint
from ddk_ds.errors import ConfigError, UserError
from ddk_ds.exit_codes import EXIT_INTERRUPTED, exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if done, 1 if a run failed, 2 for an error that the user can mend, 75 if interrupted."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    failed: list[str] = []
    try:
        if options.report_only:
            labels = options.methods if options.grid is None else list(read_grid(options.grid))
            _report(options, labels, None)
            return 0
        plan = _comparison_plan(options)
        labels = [column.label for column in plan.columns]
        if options.baseline is not None and options.baseline not in labels:
            raise ConfigError(f"--baseline {options.baseline} is none of {', '.join(labels)}")
        failed = _run_all(plan.make_jobs(), options)
        _report(options, labels, range(options.seeds))
    except (KeyboardInterrupt, RunInterrupted) as interrupted:
        print(f"interrupted: start the same command again to continue. {interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if failed else exit_code(error)
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, dashes_hint, _lacking)
    parser.add_argument("--config", type=Path, help="YAML file that all runs share")
    columns = parser.add_mutually_exclusive_group()
    columns.add_argument("--methods", type=lambda text: text.split(","), help=f"as a,b (default: {','.join(METHODS)})")
    columns.add_argument("--grid", type=Path, help="YAML file with variants: {label: [key=value, ...]}")
    columns.add_argument("--suite", choices=SUITES, help="a grid that comes with the project (configs/suites)")
    parser.add_argument(
        "--seeds", type=positive, default=3, help="runs of each, with seeds 0, 1, ... (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs and of the report")
    parser.add_argument("--ranks", type=positive, help="ranks of each run (default: one for each accelerator)")
    parser.add_argument("--baseline", help="column that the others are compared with (default: the first)")
    parser.add_argument("--stop-on-error", action="store_true", help="end with the first run that fails")
    parser.add_argument("--report-only", action="store_true", help="report on the finished runs, run nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values for all runs")
    options = parse(parser, arguments)
    if options.suite is not None:
        options.grid = SUITES[options.suite]
    return options


def _lacking(options: argparse.Namespace) -> str:
    return "" if options.config or options.report_only else "--config is needed, except with --report-only"


def _comparison_plan(options: argparse.Namespace) -> ComparisonPlan:
    return ComparisonPlan(
        config=options.config,
        overrides=tuple(options.overrides),
        out=options.out,
        seeds=options.seeds,
        methods=tuple(options.methods or METHODS),
        grid=options.grid,
    )


def _run_all(jobs: Sequence[Job], options: argparse.Namespace) -> list[str]:
    """Run the jobs one after the other and print their progress; return the names of the failed ones."""
    failed = []
    for number, job in enumerate(jobs, 1):
        try:
            for line in run_job(job, options.ranks):
                print(f"[{number}/{len(jobs)}] {line}", flush=True)
        except UserError as error:
            print(f"[{number}/{len(jobs)}] FAILED: {error}", file=sys.stderr, flush=True)
            failed.append(job.name)
            if options.stop_on_error:
                break
    if failed:
        print(f"{len(failed)} of {len(jobs)} failed: {', '.join(failed)}", file=sys.stderr)
    return failed


def _report(options: argparse.Namespace, labels: Sequence[str] | None, seeds: Iterable[int] | None) -> None:
    """Write and print the report on the finished runs of these columns and seeds; None takes all."""
    # They import torch and transformers, which takes seconds that --help should not take.
    from ddk_ds.comparison.comparison_report import markdown, write_report
    from ddk_ds.comparison.results_table import compare_runs

    comparison = compare_runs(options.out, options.baseline, labels, seeds)
    has_picture = write_report(comparison, options.out)
    print(markdown(comparison))
    if not has_picture:
        print("no comparison.png: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
