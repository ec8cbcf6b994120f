"""Turn the text of a recipe's domains into prepared data: MDS shards per domain and split, domains.json.

python tools/prepare_data.py --recipe configs/data/demo.yaml --tokenizer DIR --out DIR --sequence-length 256
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ddk_ds.data.manifest import Manifest
from ddk_ds.data.prepare import Plan, prepare
from ddk_ds.data.recipe import load_recipe
from ddk_ds.errors import UserError

DEFAULT_VALIDATION_SAMPLES = 500  # the paper's
HEADS = (
    "documents",
    "tokens",
    "train\nsamples",
    "held-out\nsamples",
    "bytes per\ntoken",
    "duplicates\ndropped",
)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", type=Path, required=True, help="YAML file that names the domains' text")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="new directory for the prepared data")
    parser.add_argument("--sequence-length", type=int, required=True, help="tokens of a sample")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--validation-samples",
        type=int,
        help=f"held-out samples that each domain has at least (default: {DEFAULT_VALIDATION_SAMPLES})",
    )
    held_out.add_argument("--validation-fraction", type=float, help="share of the documents that is held out")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="tokenising processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides what is held out (default: %(default)s)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, console: Console) -> Manifest:
    """Prepare as the options say, with a progress line per domain."""
    samples = options.validation_samples
    if samples is None and options.validation_fraction is None:
        samples = DEFAULT_VALIDATION_SAMPLES
    plan = Plan(
        sequence_length=options.sequence_length,
        validation_samples=samples,
        validation_fraction=options.validation_fraction,
        workers=options.workers,
        seed=options.seed,
    )
    recipe = load_recipe(options.recipe)
    with _progress_bar(console) as bar:
        tasks = {name: bar.add_task(name, total=domain.max_bytes) for name, domain in recipe.domains.items()}
        manifest = prepare(
            recipe,
            options.tokenizer,
            options.out,
            plan,
            progress=lambda domain, num_bytes: bar.advance(tasks[domain], num_bytes),
        )
    console.print(table(manifest))
    console.print(losses(manifest))
    console.print(f"{options.out}: {len(manifest.domains)} domains, {manifest.sequence_length:,} tokens a sample")
    return manifest


def _progress_bar(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} bytes"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def table(manifest: Manifest) -> Table:
    """What was prepared, by domain; fits into 80 columns."""
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
            f"{domain.dropped.duplicates:,}",
        )
    return result


def losses(manifest: Manifest) -> str:
    """One line on what else did not come through, over all domains."""
    dropped = [domain.dropped for domain in manifest.domains.values()]
    return (
        f"also dropped: {sum(each.too_short for each in dropped):,} documents that are too short, "
        f"{sum(each.undecodable for each in dropped):,} that are not UTF-8, "
        f"{sum(each.tail_tokens for each in dropped):,} tokens that fill no sample; "
        f"{sum(each.cut for each in dropped):,} documents were cut at max_chars"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; 0, or 2 after an error that the user can mend."""
    try:
        run(parse_arguments(arguments), Console())
    except UserError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
