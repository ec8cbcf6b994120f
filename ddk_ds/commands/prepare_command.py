"""Prepare the text of a recipe's domains: tokenise, pack, and write MDS shards of each domain and split.

ddk prepare --recipe configs/data/demo.yaml --tokenizer DIR --out DIR --sequence-length 256 [key=value]

After an interruption, the same command continues.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from ddk_ds.command_line import command_parser, parse, positive, reports_user_errors
from ddk_ds.data.contamination import Contamination
from ddk_ds.data.manifest import Manifest
from ddk_ds.data.prepare import Plan, prepare
from ddk_ds.data.recipe import Recipe, load_recipe
from ddk_ds.errors import ConfigError
from ddk_ds.evaluation.benchmark_texts import benchmark_texts
from ddk_ds.exit_codes import EXIT_ENDED_AT_ONCE

DEFAULT_VALIDATION_SAMPLES = 500  # the paper's
HEADS = ("documents", "tokens", "train\nsamples", "held-out\nsamples", "bytes per\ntoken")
LOSSES = {
    "duplicates": "duplicates",
    "too_short": "too short",
    "undecodable": "not UTF-8",
    "missing": "null",
    "cut": "cut at\nmax_chars",
    "tail_tokens": "tokens that\nfill no sample",
}
NOT_ALWAYS = {"near_duplicates": "near\nduplicates"}
"""Columns of the table of losses that it has only where there are some."""
RARE = {
    "bad_lines": "lines of jsonl files that hold no text were skipped (skip_bad_lines)",
    "control_tokens": "control tokens that the text spells were split into ordinary tokens or dropped",
    "unproven_cuts": "places in long documents where a token may differ from that of the complete document",
}
CONVERSATIONS = {
    "refused": "template\nrefused it",
    "no_target": "no turn of\nassistant",
    "spelled_controls": "spells a\ncontrol token",
    "too_long": "longer than\na sample",
}
LINE_SECONDS = 30.0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = command_parser(__doc__)
    parser.add_argument("--recipe", type=Path, required=True, help="YAML file that names the domains' text")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="new directory for the prepared data")
    parser.add_argument("--sequence-length", type=int, required=True, help="tokens of a sample")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--validation-samples",
        type=int,
        help=f"minimal number of held-out samples of each domain (default: {DEFAULT_VALIDATION_SAMPLES})",
    )
    held_out.add_argument("--validation-fraction", type=float, help="share of the documents that is held out")
    parser.add_argument(
        "--packing",
        choices=("cut", "best_fit"),
        default="cut",
        help="cut: documents are joined and cut at each sample's end, the default; best_fit: only documents that are "
        "longer than a sample are cut, and samples are padded",
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="number of tokenising processes, or of parts that run at a time (default: the cores here; with slurm "
        "and ray: all parts)",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "slurm", "ray"),
        help="prepare in parts, by datatrove's executor for processes of this machine, Slurm or Ray",
    )
    parser.add_argument("--parts", type=positive, help="number of parts (tasks of each pass; default: --workers)")
    parser.add_argument(
        "--engine-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the executor, for example partition=cpu, time=04:00:00, mem_per_cpu_gb=4",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed that selects the held-out documents (default: %(default)s)"
    )
    parser.add_argument("--start-anew", action="store_true", help="discard the work of an interrupted preparation")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe values to replace, for example root=/data/text"
    )
    return parse(parser, arguments)


def run(options: argparse.Namespace, console: Console) -> Manifest:
    """Prepare the data with a progress bar for each domain, and print what was made."""
    samples = options.validation_samples
    if samples is None and options.validation_fraction is None:
        samples = DEFAULT_VALIDATION_SAMPLES
    plan = Plan(
        sequence_length=options.sequence_length,
        validation_samples=samples,
        validation_fraction=options.validation_fraction,
        workers=len(os.sched_getaffinity(0)) if options.workers is None else options.workers,
        seed=options.seed,
        packing=options.packing,
    )
    recipe = load_recipe(options.recipe, options.overrides)
    manifest = _prepare(options, recipe, plan, console)
    console.print(table(manifest))
    console.print(losses(manifest))
    if any(domain.chat is not None for domain in manifest.domains.values()):
        console.print(conversations(manifest))
    for reason, text in RARE.items():
        counts = {name: getattr(domain.dropped, reason) for name, domain in manifest.domains.items()}
        if found := ", ".join(f"{name} {count:,}" for name, count in counts.items() if count):
            console.print(f"{text}: {found}", soft_wrap=True)
    for text in manifest.mostly_held_out(list(manifest.domains)):
        console.print(
            f"warning: fewer samples to train on than held out: {text}: lower --validation-samples, or give the domain "
            "more text (max_bytes of the recipe)",
            soft_wrap=True,
        )
    for name, domain in manifest.domains.items():
        if domain.chat is not None and domain.chat["first_refusal"]:
            console.print(
                f"{name}: the chat template first refused with: {domain.chat['first_refusal']}", soft_wrap=True
            )
    if padded := [name for name in manifest.domains if manifest.packing_of(name) == "best_fit"]:
        console.print(shares(manifest, padded), soft_wrap=True)
    begin = f"each document begins with {list(manifest.bos)}" if manifest.bos else "no BOS"
    console.print(
        f"{options.out}: {len(manifest.domains)} domains, {manifest.sequence_length:,} tokens a sample, {begin}",
        soft_wrap=True,
    )
    return manifest


def _prepare(options: argparse.Namespace, recipe: Recipe, plan: Plan, console: Console) -> Manifest:
    more = {"start_anew": options.start_anew}
    if options.engine is None:
        for name in ("parts", "engine_option"):
            if getattr(options, name):
                raise ConfigError(f"--{name.replace('_', '-')} is of a preparation in parts: give --engine too")
        contamination = _contamination(recipe, console)
        with Display(console, list(recipe.domains)) as display:
            progress = display.update
            return prepare(
                recipe, options.tokenizer, options.out, plan, progress=progress, contamination=contamination, **more
            )
    try:
        from ddk_ds.data.engines import make_engine
    except ImportError as error:
        raise ConfigError(f"--engine needs datatrove ({error}): uv pip install '.[data]'") from error
    from ddk_ds.data.prepare_parts import STAGES, prepare_in_parts

    workers = plan.workers if options.engine == "local" or options.workers else -1
    if options.parts is None and workers < 0:
        raise ConfigError(f"--engine {options.engine} needs --parts, the number of its tasks")
    engine = make_engine(options.engine, workers, dict(map(_key_and_value, options.engine_option)))
    with Display(console, STAGES) as display:
        parts = options.parts or workers
        return prepare_in_parts(
            recipe, options.tokenizer, options.out, plan, engine, parts, progress=display.update, **more
        )


def _contamination(recipe: Recipe, console: Console) -> Contamination | None:
    """Return what finds the benchmarks that the recipe keeps out, and print how they are looked for."""
    if recipe.decontaminate is None:
        return None
    directory = None if recipe.benchmarks is None else Path(recipe.benchmarks)
    contamination = Contamination(benchmark_texts(recipe.decontaminate, directory))
    sizes = (
        f"{name} {size} ({contamination.too_short[name]:,} shorter texts are not looked for)"
        for name, size in contamination.sizes.items()
    )
    console.print(f"kept out, by n-grams of so many words: {', '.join(sizes)}", soft_wrap=True)
    return contamination


def _key_and_value(option: str) -> tuple[str, str]:
    key, equals, value = option.partition("=")
    if not equals:
        raise ConfigError(f"--engine-option {option}: write it as key=value, for example partition=cpu")
    return key, value


class Display:
    """Progress with the remaining time: a bar for each domain on a terminal, a line every 30 seconds elsewhere."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks = {name: self._bar.add_task(name, total=None, start=False) for name in names}
        self._begun: dict[str, tuple[float, int]] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def update(self, name: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of a domain are encoded."""
        now = time.monotonic()
        if name not in self._begun:
            # Work of an interrupted preparation does not count for the speed of this one.
            self._begun[name] = now, done
            self._bar.reset(self._tasks[name], total=total, completed=done)
        self._bar.update(self._tasks[name], completed=done, total=total)
        if not self._console.is_terminal and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            self._console.print(
                progress_line(name, done, total, done - self._begun[name][1], now - self._begun[name][0])
            )


def progress_line(name: str, done: int, total: int, new: int, seconds: float) -> str:
    """Return one line of a log; this process encoded `new` of the `done` bytes, in `seconds`."""
    speed = new / max(seconds, 1e-9)
    left = f"{(total - done) / speed:,.0f} s left" if speed > 0 else "time left unknown"
    return f"{name}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB ({done / total:.0%}), {speed / 1e6:.1f} MB/s, {left}"


def table(manifest: Manifest) -> Table:
    """Return the table of what was prepared, by domain; it fits into 80 columns."""
    result = Table(title="Prepared data", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    result.add_column("domain")
    for head in HEADS:
        result.add_column(head, justify="right", no_wrap=True)
    for name, domain in manifest.domains.items():
        parts = (domain.train, domain.validation)
        tokens = sum(part.tokens for part in parts)
        result.add_row(
            name,
            f"{sum(part.documents for part in parts):,}",
            f"{tokens:,}",
            f"{domain.train.samples:,}",
            f"{domain.validation.samples:,}",
            f"{sum(part.bytes for part in parts) / (tokens + domain.dropped.tail_tokens):.2f}",
        )
    return result


def shares(manifest: Manifest, names: Sequence[str]) -> str:
    """Return a line with the shares of padding and of cut documents in each of the domains `names`."""
    found = []
    for name in names:
        domain = manifest.domains[name]
        parts = (domain.train, domain.validation)
        padding, cut, documents = (
            sum(getattr(part, key) for part in parts) for key in ("padding_tokens", "cut_documents", "documents")
        )
        places = manifest.sequence_length * sum(part.samples for part in parts)
        found.append(f"{name} {padding / places:.2%} and {cut / documents:.2%}")
    return f"padding tokens of all, and documents longer than a sample, which are cut: {', '.join(found)}"


def losses(manifest: Manifest) -> Table:
    """Return the table of dropped documents by domain and reason; its last column counts tokens."""
    result = Table(title="Dropped", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    result.add_column("domain")
    found = {reason for reason in NOT_ALWAYS for domain in manifest.domains.values() if getattr(domain.dropped, reason)}
    reasons = {**LOSSES, **{reason: NOT_ALWAYS[reason] for reason in NOT_ALWAYS if reason in found}}
    benchmarks = list(dict.fromkeys(name for domain in manifest.domains.values() for name in domain.contaminated))
    for head in (*reasons.values(), *(f"text of\n{name}" for name in benchmarks)):
        result.add_column(head, justify="right", no_wrap=True)
    for name, domain in manifest.domains.items():
        counts = [getattr(domain.dropped, reason) for reason in reasons]
        counts += [domain.contaminated.get(benchmark, 0) for benchmark in benchmarks]
        result.add_row(name, *(f"{count:,}" for count in counts))
    return result


def conversations(manifest: Manifest) -> Table:
    """Return the table of the domains that hold conversations: targets among their tokens, and what was dropped."""
    result = Table(title="Conversations", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    result.add_column("domain")
    for head in ("target\ntokens", "share", *(f"dropped:\n{text}" for text in CONVERSATIONS.values())):
        result.add_column(head, justify="right", no_wrap=True)
    for name, domain in manifest.domains.items():
        if domain.chat is not None:
            parts = (domain.train, domain.validation)
            targets, tokens = (sum(getattr(part, key) for part in parts) for key in ("target_tokens", "tokens"))
            counts = (f"{getattr(domain.dropped, reason):,}" for reason in CONVERSATIONS)
            result.add_row(name, f"{targets:,}", f"{targets / tokens:.1%}", *counts)
    return result


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the data. Returns the exit code: 0, 2 after an error that the user can fix, 130 if interrupted."""
    try:
        run(parse_arguments(arguments), Console())
    except KeyboardInterrupt:
        print("interrupted: start the same command again to continue", file=sys.stderr)
        return EXIT_ENDED_AT_ONCE
    return 0
