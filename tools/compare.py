"""Compare methods by runs from one starting student on the same number of tokens, with several seeds each.

    python tools/compare.py --config my.yaml --methods cpt,kd,ddk --seeds 3 --out runs/compared [key=value ...]

Each run goes through the `deepspeed` launcher. A finished one is not run again, an unfinished one goes on: start the
same command again. Leaves comparison.json, comparison.md and comparison.png in --out (docs/comparing.md).
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddk_ds.command_line import EXIT_INTERRUPTED, positive
from ddk_ds.comparison.comparison_report import draw, markdown
from ddk_ds.comparison.method_stages import Job, RunInterrupted, run_job
from ddk_ds.comparison.results_table import about, compare, read_results
from ddk_ds.errors import ConfigError, DataError, UserError
from ddk_ds.files import write_text

METHODS = ("cpt", "kd", "ddk_equal", "ddk_no_smoothing", "ddk")
OWN_KEYS = ("name", "output_dir", "seed", "method")
PRESET_KEYS = ("mixture.controller", "loss.divergence")
"""What a method sets itself, unless the configuration does."""
_LABEL = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True)
class Entry:
    """One column of the comparison: a method, or a grid's variant of one."""

    label: str
    method: str
    overrides: tuple[str, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a run failed, 2 an error that the user can mend, 75 interrupted."""
    options = _parse(arguments)
    failed: list[str] = []
    try:
        if options.report_only:
            return _report_only(options)
        entries = _entries(options)
        if options.baseline is not None and options.baseline not in [entry.label for entry in entries]:
            raise ConfigError(f"--baseline {options.baseline} is none of {', '.join(e.label for e in entries)}")
        failed = _run_all(make_jobs(options, entries), options)
        _report(options, [entry.label for entry in entries], range(options.seeds))
    except (KeyboardInterrupt, RunInterrupted) as interrupted:
        print(f"interrupted: start the same command again to go on. {interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if failed else 2
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, help="YAML file that all runs share")
    columns = parser.add_mutually_exclusive_group()
    columns.add_argument("--methods", type=lambda text: text.split(","), help=f"as a,b (default: {','.join(METHODS)})")
    columns.add_argument("--grid", type=Path, help="YAML file with variants: {label: [key=value, ...]}")
    parser.add_argument(
        "--seeds", type=positive, default=3, help="runs of each, with seeds 0, 1, ... (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs and of the report")
    parser.add_argument("--ranks", type=positive, help="of each run (default: one for each accelerator of the machine)")
    parser.add_argument("--baseline", help="what the others are held against (default: the first of them)")
    parser.add_argument("--stop-on-error", action="store_true", help="end with the first run that fails")
    parser.add_argument("--report-only", action="store_true", help="report on the runs that are there, run nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values for all runs")
    options = parser.parse_intermixed_args(arguments)
    if options.config is None and not options.report_only:
        parser.error("--config is needed, but for --report-only")
    return options


def _entries(options: argparse.Namespace) -> list[Entry]:
    if options.grid is None:
        names = options.methods or METHODS
        return [Entry(name, name) for name in dict.fromkeys(names)]
    default = _configured(options, "method") or "ddk"
    return [_variant(label, items, default) for label, items in read_grid(options.grid).items()]


def read_grid(path: Path) -> dict[str, list[str]]:
    """A grid's variants: overrides by label. Raises ConfigError naming what is wrong in the file."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--grid {path}: cannot be read as YAML: {error}") from error
    variants = values.get("variants") if isinstance(values, dict) else None
    if not isinstance(variants, dict) or not variants:
        raise ConfigError(f"--grid {path}: write variants: {{label: [key=value, ...]}}")
    for label, items in variants.items():
        if not re.fullmatch(_LABEL, str(label)):
            raise ConfigError(f"--grid {path}: label {label!r}: use letters, digits and . _ -, as in a run's name")
        if not isinstance(items, list) or not all(isinstance(item, str) and "=" in item for item in items):
            raise ConfigError(f"--grid {path}: {label}: {items!r} is no list of key=value")
    return {str(label): items for label, items in variants.items()}


def _variant(label: str, overrides: list[str], default_method: str) -> Entry:
    methods = [item.partition("=")[2] for item in overrides if item.startswith("method=")]
    rest = tuple(item for item in overrides if not item.startswith("method="))
    return Entry(label, methods[-1] if methods else default_method, rest)


def make_jobs(options: argparse.Namespace, entries: Sequence[Entry]) -> list[Job]:
    """One for each seed and entry, checked as far as possible; raises ConfigError before anything runs.

    All entries have their first seed before any has its second, so that a partial comparison is one of all.
    """
    for entry in entries:
        _check_own_keys((*options.overrides, *entry.overrides))
        for key in PRESET_KEYS:
            value = _configured(options, key)
            # A variant of the configuration's own method keeps what that has.
            changes = options.grid is None or entry.method != (_configured(options, "method") or "ddk")
            if changes and value is not None and not any(item.startswith(f"{key}=") for item in entry.overrides):
                raise ConfigError(
                    f"{key}: {options.config} or an override sets it to {value!r}, which would hold for every method: "
                    f"leave it out (each method has its own), or give it in a variant of --grid ({entry.label})"
                )
    jobs = [
        Job(
            options.config,
            entry.method,
            f"{entry.label}-s{seed}",
            options.out,
            (*options.overrides, *entry.overrides, f"seed={seed}"),
        )
        for seed in range(options.seeds)
        for entry in entries
    ]
    for job in jobs:
        job.check()
    return jobs


def _check_own_keys(overrides: Iterable[str]) -> None:
    for item in overrides:
        if item.partition("=")[0] in OWN_KEYS:
            raise ConfigError(f"override {item}: the comparison sets it; use --out, --seeds, --methods or --grid")


def _configured(options: argparse.Namespace, key: str) -> Any:
    """What the YAML file and the overrides for all runs give; None where they leave it to its default."""
    try:
        merged = OmegaConf.merge(OmegaConf.load(options.config), OmegaConf.from_dotlist(list(options.overrides)))
        return OmegaConf.select(merged, key)
    except (OSError, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"--config {options.config}: cannot be read with the overrides given: {error}") from error


def _run_all(jobs: Sequence[Job], options: argparse.Namespace) -> list[str]:
    """Run them one after the other; a line for each run. Returns the names of those that failed."""
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


def _report_only(options: argparse.Namespace) -> int:
    labels = options.methods
    if options.grid is not None:
        labels = list(read_grid(options.grid))
    _report(options, labels, None)
    return 0


def _report(options: argparse.Namespace, labels: list[str] | None, seeds: Iterable[int] | None) -> None:
    results = read_results(options.out, labels, seeds)
    if not results:
        raise DataError(f"{options.out}: no run <method>-s<seed> in it is finished: nothing to report")
    baseline = options.baseline or (labels or [results[0].label])[0]
    comparison = {**compare(results, baseline), **about(options.out, results)}
    write_text(options.out / "comparison.json", json.dumps(comparison, indent=1) + "\n")
    text = markdown(comparison)
    write_text(options.out / "comparison.md", text)
    print(text)
    if find_spec("matplotlib") is None:
        print("no comparison.png: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return
    draw(comparison, options.out / "comparison.png")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.exit(main())
