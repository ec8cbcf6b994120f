"""Train a byte-level BPE tokenizer on a balanced sample of a recipe's domains, in Hugging Face's layout.

ddk tokenizer --recipe configs/data/demo.yaml --vocab-size 8192 --out DIR
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ddk_ds.command_line import command_parser, parse, reports_user_errors
from ddk_ds.data.recipe import load_recipe
from ddk_ds.data.tokenizer import load_tokenizer, refuse_existing, save_tokenizer, train_tokenizer


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = command_parser(__doc__)
    parser.add_argument("--recipe", type=Path, required=True, help="YAML file that names the domains' text")
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="number of tokens, including the two special tokens"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the tokenizer")
    parser.add_argument(
        "--domain-bytes",
        type=int,
        default=1_000_000,
        help="bytes of text of each domain to train on (default: %(default)s)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe values to replace, for example root=/data/text"
    )
    return parse(parser, arguments)


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Train and save the tokenizer. Returns the exit code: 0, or 2 after an error that the user can fix."""
    options = parse_arguments(arguments)
    start = time.monotonic()
    console = Console()
    refuse_existing(options.out)
    recipe = load_recipe(options.recipe, options.overrides)
    with console.status("training the tokenizer"):
        tokenizer = train_tokenizer(recipe, options.vocab_size, domain_bytes=options.domain_bytes)
    save_tokenizer(tokenizer, options.out)
    info = load_tokenizer(options.out)
    console.print(
        f"{options.out}: {info.vocab_size:,} tokens from {len(recipe.domains)} domains, "
        f"fingerprint {info.fingerprint[:12]}, {time.monotonic() - start:.1f} s"
    )
    return 0
