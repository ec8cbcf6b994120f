"""Hash every shard of prepared data on all cores, and list the shards that differ from their index.

ddk verify DIR
ddk verify s3://bucket/data --cache-dir /local/cache --cache-limit-gb 50
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ddk_ds.command_line import command_parser, parse, reports_user_errors
from ddk_ds.config import Data
from ddk_ds.data.cache import open_store
from ddk_ds.data.manifest import SPLITS, load_manifest
from ddk_ds.data.mds import read_index
from ddk_ds.data.store import Shard, Store
from ddk_ds.errors import ConfigError, UserError


def shards_of(store: Store) -> Iterator[Shard]:
    """Yield every shard of every domain. Raises DataError if an index or domains.json is damaged."""
    for name in load_manifest(store).domains:
        for split in SPLITS:
            index = read_index(store, f"{name}/{split}")
            yield from (*index.shards, *set(index.beside.values()))


def broken_shards(store: Store, shards: Sequence[Shard], workers: int, bar: Progress) -> list[str]:
    """Return an error message for each damaged shard, in the shards' order."""
    task = bar.add_task("hashing", total=sum(shard.num_bytes for shard in shards))
    errors: dict[int, str] = {}
    # Hashing and reading release the interpreter's lock, so threads are enough.
    with ThreadPoolExecutor(workers) as pool:
        numbers = {pool.submit(store.shard, shard): number for number, shard in enumerate(shards)}
        for done in as_completed(numbers):
            number = numbers[done]
            error = done.exception()
            if isinstance(error, UserError):
                errors[number] = str(error)
            elif error is not None:
                raise error
            bar.advance(task, shards[number].num_bytes)
    return [errors[number] for number in sorted(errors)]


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Verify the data. Returns 0, 1 if a shard is damaged, or 2 after an error that the user can fix."""
    parser = command_parser(__doc__)
    parser.add_argument("path", help="directory or URL of the prepared data")
    parser.add_argument("--cache-dir", help="directory for remote shards; those that it holds already are hashed, too")
    parser.add_argument("--cache-limit-gb", type=float, help="maximal size of the cache")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers", type=int, default=cores, help="number of files hashed at a time (default: %(default)s)"
    )
    options = parse(parser, arguments)
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    store = open_store(_data(options))
    shards = list(shards_of(store))
    with Progress(*columns, console=console, transient=True) as bar:
        broken = broken_shards(store, shards, max(1, options.workers), bar)
    for text in broken:
        console.print(text, style="bold red", highlight=False, soft_wrap=True, markup=False)
    size = sum(shard.num_bytes for shard in shards)
    console.print(f"{options.path}: {len(shards):,} shards, {size:,} bytes, {len(broken)} broken", soft_wrap=True)
    return int(bool(broken))


def _data(options: argparse.Namespace) -> Data:
    try:
        return Data(path=options.path, cache_dir=options.cache_dir, cache_limit_gb=options.cache_limit_gb)
    except ValidationError as error:
        raise ConfigError("; ".join(str(item["msg"]) for item in error.errors())) from None
