"""Train a byte-level BPE tokenizer on a balanced sample of a recipe's domains, in Hugging Face's layout.

ddk tokenizer --recipe configs/data/demo.yaml --vocab-size 8192 --out DIR

Or write tokenizer.json for a model that has a SentencePiece model or tiktoken's ranks alone:

ddk tokenizer --convert models/X
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
    parser = command_parser(__doc__, check=_not_one_of_two)
    parser.add_argument("--recipe", type=Path, help="YAML file that names the domains' text")
    parser.add_argument("--vocab-size", type=int, help="number of tokens, including the two special tokens")
    parser.add_argument("--out", type=Path, help="directory for the tokenizer")
    parser.add_argument(
        "--domain-bytes",
        type=int,
        default=1_000_000,
        help="bytes of text of each domain to train on (default: %(default)s)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe values to replace, for example root=/data/text"
    )
    parser.add_argument(
        "--convert", type=Path, metavar="DIR", help="model whose tokenizer.model or *.tiktoken is converted"
    )
    parser.add_argument("--pattern", help="with --convert: regular expression by which a tiktoken encoding cuts text")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="with --convert: run the tokenizer's own Python code"
    )
    return parse(parser, arguments)


def _not_one_of_two(options: argparse.Namespace) -> str:
    training = (options.recipe, options.vocab_size, options.out)
    if options.convert is None and None in training:
        return "give --recipe, --vocab-size and --out, or --convert"
    if options.convert is not None and training != (None, None, None):
        return "--convert stands alone: it writes into the model's directory"
    return ""


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Train and save a tokenizer, or convert one. Returns the exit code: 0, or 2 after an error the user can fix."""
    options = parse_arguments(arguments)
    start = time.monotonic()
    console = Console()
    if options.convert is not None:
        # Imports transformers, which takes seconds that --help should not take.
        from ddk_ds.engine.tokenizer_conversion import NUM_LINES, convert_tokenizer

        original = convert_tokenizer(options.convert, options.pattern, trusted=options.trust_remote_code)
        info = load_tokenizer(options.convert)
        console.print(
            f"{info.path}: {info.vocab_size:,} tokens; {NUM_LINES:,} lines have the tokens that {original.name} gives "
            f"them; EOS {info.eos_token_id}, put before a text {list(info.bos)}",
            soft_wrap=True,
        )
        return 0
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
