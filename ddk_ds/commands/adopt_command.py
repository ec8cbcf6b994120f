"""Take token shards that exist as data of a run: MDS shards as llm-foundry writes them, or Megatron-LM's .bin and .idx.

ddk adopt code=/data/code web=/data/web --tokenizer DIR --out data/mine
ddk adopt /data/c4_text_document --tokenizer DIR --out data/c4 --sequence-length 2048

The shards are checked and hashed, and read where they are; they are never changed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ddk_ds.command_line import command_parser, parse, positive, reports_user_errors
from ddk_ds.errors import DataError

if TYPE_CHECKING:
    from ddk_ds.data.adopt import Source
    from ddk_ds.data.manifest import Manifest
    from ddk_ds.data.tokenizer import TokenizerInfo

DEFAULT_VALIDATION_SAMPLES = 500  # the paper's, as ddk prepare has it
_BORDERS = {"eos": "after", "bos": "before"}
_LINE_SECONDS = 30.0
_SHOWN_TOKENS = 60
_TRUSTED_SHARE = 0.9


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="[NAME=]DIR",
        help="a domain's MDS directory (or one with train/ and val/ in it), directory of .bin and .idx, or their "
        "prefix; the name is that of the directory unless it is given",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of the tokenizer that made the ids")
    parser.add_argument("--out", type=Path, required=True, help="new directory for domains.json and the indexes")
    parser.add_argument("--sequence-length", type=positive, help="tokens of a sample; MDS shards say it themselves")
    parser.add_argument(
        "--validation",
        action="append",
        metavar="DIR",
        help="a domain's held-out shards, once for each domain, in order",
    )
    parser.add_argument(
        "--validation-samples",
        type=positive,
        default=DEFAULT_VALIDATION_SAMPLES,
        help="samples held out at each domain's end where no held-out shards are given (default: %(default)s)",
    )
    parser.add_argument(
        "--borders",
        choices=tuple(_BORDERS),
        help="documents of MDS samples end with each EOS, or begin with each BOS (default: they are joined)",
    )
    parser.add_argument("--ids", choices=("int32", "int64"), help="type of ids in a column of bytes (default: found)")
    parser.add_argument("--copy", action="store_true", help="write the ids to new shards, of this project")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=positive, default=cores, help="shards read at a time (default: %(default)s)")
    return parse(parser, arguments)


def sources_of(options: argparse.Namespace) -> list[Source]:
    """Return the domains that are named. Raises DataError for a name that is none, or is given twice."""
    from ddk_ds.config.sections import FILE_NAME, FILE_NAME_RULE
    from ddk_ds.data.adopt import Source

    validation = [Path(given) for given in options.validation or []]
    if validation and len(validation) != len(options.sources):
        raise DataError(
            f"--validation is given {len(validation)} times for {len(options.sources)} domains; give each one"
        )
    found: dict[str, Source] = {}
    for number, given in enumerate(options.sources):
        named, _, place = given.rpartition("=")
        path = Path(place)
        name = named or os.path.basename(os.path.abspath(place)).removesuffix(".bin").removesuffix(".idx")
        if not re.fullmatch(FILE_NAME, name):
            raise DataError(f"domain {name!r}: {FILE_NAME_RULE}; give NAME={place}")
        if name in found:
            raise DataError(f"domain {name!r} is given twice ({found[name].place} and {path}); give NAME=DIR")
        found[name] = Source(name, path, validation[number] if validation else None)
    return list(found.values())


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Adopt the shards; return 0, or 2 for an error that the user can mend."""
    options = parse_arguments(arguments)
    # Only here: --help needs neither torch nor streaming.
    from ddk_ds.data.adopt import Rules, adopt, copied_bytes, open_source
    from ddk_ds.data.tokenizer import load_tokenizer

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    borders = _BORDERS[options.borders] if options.borders else None
    rules = Rules(
        sequence_length=options.sequence_length,
        held_out=options.validation_samples,
        ids=options.ids,
        borders=borders,  # type: ignore[arg-type]
        copy=options.copy,
        workers=options.workers,
    )
    info = load_tokenizer(options.tokenizer)
    opened = [open_source(source, rules) for source in sources_of(options)]
    if options.copy:
        console.print(f"copies {copied_bytes(opened, info):,} bytes of ids to {options.out}")
    manifest, shared = adopt(opened, info, options.out, rules, _Lines(console).told)
    console.print(table(manifest))
    for name, number in shared.items():
        if number:
            console.print(f"warning: {name}: {number:,} held-out samples are also trained on, token for token")
    preview(console, manifest, info)
    known = "documents apart (data.documents)" if manifest.borders else "documents joined: their borders are not known"
    begin = f"begin with {list(manifest.bos)}" if manifest.bos else "no BOS"
    copied = "copied" if options.copy else "read in place"
    console.print(
        f"{options.out}: {len(manifest.domains)} domains, {manifest.sequence_length:,} tokens a sample, {begin}, "
        f"{known}; {copied}"
    )
    return 0


class _Lines:
    """A line about the shards that are checked, every 30 seconds."""

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, time.monotonic()

    def told(self, name: str, done: int, total: int) -> None:
        """Print how far a domain is."""
        if time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            self._console.print(f"{name}: {done:,} of {total:,} shards are checked")


def table(manifest: Manifest) -> Table:
    """Return the table of what was adopted."""
    result = Table(title="Adopted shards", box=None, pad_edge=False)
    for number, head in enumerate(("domain", "shards", "tokens", "train samples", "held-out samples", "largest id")):
        result.add_column(head, justify="right" if number > 1 else "left")
    for name, domain in manifest.domains.items():
        train, held_out = domain.train, domain.validation
        counts = (train.tokens + held_out.tokens, train.samples, held_out.samples)
        largest = max(train.largest_id, held_out.largest_id)
        result.add_row(name, str(domain.adopted["train"]), *(f"{count:,}" for count in counts), f"{largest:,}")
    return result


def preview(console: Console, manifest: Manifest, info: TokenizerInfo) -> None:
    """Print the beginning of each domain's first sample as text, and warn where another tokenizer has made the ids."""
    from ddk_ds.data.mds import open_split
    from ddk_ds.data.same_cuts import found_again
    from ddk_ds.data.store import LocalStore

    for name in manifest.domains:
        ids = open_split(LocalStore(manifest.root), f"{name}/train").tokens(0).tolist()
        text = info.tokenizer.decode(ids[:_SHOWN_TOKENS], skip_special_tokens=False)
        share = found_again(info, ids)
        console.print(f"{name}, sample 0 (is it the text?): {text!r}")
        if share < _TRUSTED_SHARE:
            console.print(
                f"warning: {name}: encoded again, its text has {share:.0%} of its tokens: another tokenizer than "
                f"{info.path.parent} may have made them; then every loss is of wrong text",
                soft_wrap=True,
            )
