"""Look at the data of a run: counts of each domain, one sample as text, or a page with both.

ddk look data/mine
ddk look data/mine --domain code --sample 17
ddk look data/mine --html data.html

A sample is shown with the borders of its documents. Control tokens stand out, and tokens that are no targets are dim.
Counts are of a part of huge data, which is said.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ddk_ds.command_line import command_parser, parse, positive, reports_user_errors
from ddk_ds.errors import DataError

if TYPE_CHECKING:
    from ddk_ds.data.data_facts import DomainFacts
    from ddk_ds.data.manifest import Manifest
    from ddk_ds.data.mds import Packed
    from ddk_ds.data.store import LocalStore
    from ddk_ds.data.tokenizer import TokenizerInfo

_ON_PAGE = 10


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = command_parser(__doc__)
    parser.add_argument("data", type=Path, metavar="DIR", help="prepared or adopted data")
    parser.add_argument("--domain", help="the domain to look at (default: all; of --sample the first)")
    parser.add_argument("--split", choices=("train", "validation"), default="train", help="(default: %(default)s)")
    parser.add_argument("--sample", metavar="N", help="number of a sample to show from 0 on, or random")
    parser.add_argument("--tokenizer", type=Path, help="directory of the tokenizer (default: where the data's was)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures and ten samples a domain")
    parser.add_argument("--tokens", type=positive, help="most tokens of a domain to look at (default: 2097152)")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is chosen by chance (default: %(default)s)")
    parser.add_argument("--color", action="store_true", help="colours also where the output is no terminal")
    return parse(parser, arguments)


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Show or write what was asked for; return 0, or 2 for an error that the user can mend."""
    options = parse_arguments(arguments)
    # Only here: --help needs neither numpy nor streaming.
    from ddk_ds.data.data_facts import MOST_TOKENS, look
    from ddk_ds.data.manifest import load_manifest
    from ddk_ds.data.store import LocalStore

    terminal = sys.stdout.isatty()
    console = Console(
        highlight=False, markup=False, force_terminal=options.color or None, width=None if terminal else 100
    )
    store = LocalStore(options.data)
    manifest = load_manifest(store)
    names = [options.domain] if options.domain else list(manifest.domains)
    manifest.require(names)
    info = tokenizer_of(manifest, options.tokenizer)
    if options.sample is not None:
        show_sample(console, store, manifest, names[0], info, options)
        return 0
    most, examples = options.tokens or MOST_TOKENS, _ON_PAGE if options.html else 0
    limits = {"examples": examples, "seed": options.seed, "most_tokens": most}
    facts = [look(store, manifest, name, options.split, info, **limits) for name in names]
    console.print(table(facts, manifest))
    for one in facts:
        console.print(frequent(one, info), soft_wrap=True)
    if options.html:
        from ddk_ds.report.data_page import write_data_page

        write_data_page(options.html, manifest, options.split, facts, info)
        console.print(options.html, soft_wrap=True)
    return 0


def tokenizer_of(manifest: Manifest, given: Path | None) -> TokenizerInfo:
    """Return the tokenizer of the data. Raises DataError if it is not there, or another one is given."""
    from ddk_ds.data.same_cuts import prepared_with
    from ddk_ds.data.tokenizer import load_tokenizer

    place = given or (Path(manifest.tokenizer_path) if manifest.tokenizer_path else None)
    if place is None or not (place / "tokenizer.json").is_file():
        where = f"is no more at {place}" if place else "is not named by domains.json"
        raise DataError(f"the tokenizer of {manifest.root} {where}: give its directory by --tokenizer")
    info = load_tokenizer(place)
    if not prepared_with(manifest, info):
        raise DataError(f"{place} is another tokenizer than that of {manifest.root}: give that one by --tokenizer")
    return info


def show_sample(
    console: Console, store: LocalStore, manifest: Manifest, name: str, info: TokenizerInfo, options: argparse.Namespace
) -> None:
    """Print one sample. Raises DataError if there is none of that number."""
    import numpy as np

    from ddk_ds.data.mds import open_split

    opened = open_split(store, f"{name}/{options.split}", manifest.vocab_size)
    if options.sample == "random":
        number = int(np.random.default_rng(options.seed).integers(len(opened)))
    elif options.sample.isdecimal() and int(options.sample) < len(opened):
        number = int(options.sample)
    else:
        raise DataError(f"--sample {options.sample}: {name} has samples 0 to {len(opened) - 1:,}; or give random")
    packed = opened.packed(number)
    count = 0 if packed.lengths is None else len(packed.lengths)
    known = f"{count:,} document{'s' * (count > 1)}" if count else "no borders of documents"
    console.print(f"{name}, {options.split}, sample {number:,}: {len(packed.tokens):,} tokens, {known}", style="bold")
    console.print(shown(packed, info), soft_wrap=True)


def shown(packed: Packed, info: TokenizerInfo) -> Text:
    """Return a sample as text with its borders; control tokens are bold, and what is no target is dim."""
    from ddk_ds.data.data_facts import pieces

    text, document, begin = Text(), -1, 0
    for piece in pieces(packed, info):
        if piece.document != document and packed.lengths is not None:
            document = piece.document
            length = int(packed.lengths[document])
            text.append(f"{'' if not document else chr(10)}── document {document + 1}: ", style="cyan")
            text.append(f"tokens {begin:,} to {begin + length - 1:,} ──\n", style="cyan")
            begin += length
        style = "bold magenta" if piece.control else ""
        text.append(piece.text, style=style if piece.target else f"{style} dim".strip())
    return text


def table(facts: Sequence[DomainFacts], manifest: Manifest) -> Table:
    """Return the table of what was found, a row for each domain."""
    result = Table(title=f"{manifest.root}", box=None, pad_edge=False)
    heads = ("domain", "samples", "looked\nat", "equal\nones", "median of\ndocuments", "bytes per\ntoken", "no text")
    for number, head in enumerate(heads):
        result.add_column(head, justify="right" if number else "left")
    for one in facts:
        median = f"{one.quantiles[1]:,.0f}" if one.quantiles else "-"
        row = (f"{one.samples:,}", f"{len(one.numbers):,}", f"{one.duplicates:,}", median, f"{one.bytes_per_token:.2f}")
        result.add_row(one.name, *row, f"{one.replaced / max(1, one.characters):.3%}")
    return result


def frequent(one: DomainFacts, info: TokenizerInfo) -> str:
    """Return a line with a domain's most frequent tokens."""
    from ddk_ds.data.data_facts import token_text

    found = ", ".join(f"{token_text(info, number)!r} {count / one.tokens:.1%}" for number, count in one.top[:8])
    return f"{one.name}: {found}"
