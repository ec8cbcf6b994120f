"""Compare the speed of this project's loader, mosaicml-streaming's loader, and a bare memory map as the floor.

    python -m tools.bench.bench_loader [--samples 20000] --json FILE

All three read the same random samples of uint16 tokens in one run. Also measured are this project's loader with a
cache of a teacher beside the tokens, and with as many bytes beside them, memory-mapped and unchecked (the floor of
that); the time to an interval's first batch, and the time and memory that planning an interval takes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from ddk_ds.data.cache import CachedStore, CacheOptions
from ddk_ds.data.loader import MixtureDataset, interval_loader
from ddk_ds.data.manifest import DomainInfo, Manifest, SplitInfo, write_manifest
from ddk_ds.data.mds import write_split
from ddk_ds.data.readers import Readers
from ddk_ds.data.teacher_cache import TeacherCache, make_cache
from ddk_ds.data.teacher_place import LocalPlace
from ddk_ds.data.teacher_samples import Drawn
from ddk_ds.files import write_text
from ddk_ds.mixture.interval_state import IntervalState, interval_ids
from ddk_ds.mixture.order import DomainOrder

Row = dict[str, Any]
Ids = npt.NDArray[np.int64]
MICRO_BATCH = 8
SHARD_BYTES = 1 << 22
NUM_DOMAINS = 4
VOCAB, DRAWS = 50_000, 64
CONDITIONS = {"keep": "sampled", "draws": DRAWS, "vocab_size": VOCAB}
PLANNED_SAMPLES = 1000 * 1024


def make_data(root: Path, num_samples: int, length: int) -> None:
    """Write prepared data with domains of random tokens to `root`."""
    generator = np.random.default_rng(0)
    domains = {}
    for number in range(NUM_DOMAINS):
        infos = {}
        for split, count in (("train", num_samples // NUM_DOMAINS), ("validation", 2)):
            samples = (generator.integers(0, 50_000, length, np.uint16) for _ in range(count))
            directory = root / f"domain{number}" / split
            written = write_split(directory, samples, sequence_length=length, dtype="uint16", shard_bytes=SHARD_BYTES)
            infos[split] = SplitInfo(documents=count, tokens=count * length, bytes=count * length, **written)
        domains[f"domain{number}"] = DomainInfo(infos["train"], infos["validation"])
    write_manifest(Manifest(root, length, "uint16", "none", 50_000, 0, domains))


def order_of(dataset: MixtureDataset, num_samples: int) -> Ids:
    """Return the sample ids of an interval with equal proportions, in the order of training."""
    orders = [DomainOrder(name, sizes, seed=0) for name, sizes in zip(dataset.names, dataset.shard_sizes, strict=True)]
    entries = [{"name": n, "num_samples": int(s), "sha": ""} for n, s in zip(dataset.names, dataset.sizes, strict=True)]
    state = IntervalState.new(entries, seed=0).advance([1 / len(orders)] * len(orders), num_samples)  # type: ignore[arg-type]
    return interval_ids(orders, dataset.sample_offsets, state)


def read_ours(root: Path, ids: Ids, workers: int, cache: Path | None, limit_gb: float | None) -> tuple[float, float]:
    """Read by this project's loader. Returns the seconds to the first batch, and the seconds in total."""
    store = None if cache is None else CachedStore(str(root), CacheOptions(cache, limit_gb, 60.0, 10.0))
    names = [f"domain{number}" for number in range(NUM_DOMAINS)]
    dataset = MixtureDataset(root if store is None else store, names)
    with closing(Readers(workers)) as readers:
        readers.start()
        started = time.perf_counter()
        return _drain(started, interval_loader(dataset, ids, rank=0, world=1, micro_batch=MICRO_BATCH, readers=readers))


def make_teacher_cache(root: Path, dataset: MixtureDataset) -> int:
    """Write what a teacher says of every sample, about 20 tokens of 64 draws; return the mean bytes of a sample."""
    place, length = LocalPlace(root / "teacher"), len(dataset[0]["input_ids"])
    make_cache(place, CONDITIONS)
    cache = TeacherCache(place, CONDITIONS, dict(zip(dataset.names, dataset.shas, strict=True)), VOCAB)
    generator = np.random.default_rng(0)
    ends = np.cumsum(np.arange(1, VOCAB) ** -1.55)
    tokens = generator.permutation(VOCAB)
    said = []
    for _ in range(16):
        ranks = np.searchsorted(ends, generator.random((length, DRAWS)) * ends[-1])
        said.append(Drawn(np.sort(tokens[ranks], 1), *generator.random((2, length), np.float32)))
    num_bytes = 0
    for number, (domain, sample) in enumerate(dataset.places(np.arange(len(dataset)))):
        num_bytes += len(cache.add(domain, sample, said[number % len(said)]))
    cache.publish()
    num_bytes //= len(dataset)
    generator.integers(0, 255, (len(dataset), num_bytes), np.uint8).tofile(root / "beside.bin")
    return num_bytes


def read_with_teacher(
    root: Path, ids: Ids, workers: int, num_bytes: int, length: int, *, floor: bool
) -> tuple[float, float, float]:
    """Read by this project's loader with a teacher's cache, or as many bytes of a memory map, beside the tokens.

    Returns what `read_ours` does, and the seconds that unpacking takes of a sample.
    """
    from ddk_ds.methods import CachedTeacher  # imports DeepSpeed

    dataset = MixtureDataset(root, [f"domain{number}" for number in range(NUM_DOMAINS)])
    place = LocalPlace(root / "teacher")
    store = TeacherCache(place, CONDITIONS, dict(zip(dataset.names, dataset.shas, strict=True)), VOCAB)
    mapped = np.memmap(root / "beside.bin", np.uint8, mode="r").reshape(-1, num_bytes)
    cached: Any = CachedTeacher(store, dataset, None, None)  # type: ignore[arg-type]
    with closing(Readers(workers)) as readers:
        readers.start()
        started = time.perf_counter()
        batches: Any = interval_loader(dataset, ids, rank=0, world=1, micro_batch=MICRO_BATCH, readers=readers)
        if floor:
            batches = ([mapped[sample].tobytes() for sample in batch["sample_id"].tolist()] for batch in batches)
        else:
            batches = cached.ahead(batches)
        first, total = _drain(started, batches)
    records = [store.read(*place) for place in dataset.places(ids[: 8 * MICRO_BATCH])]
    started = time.perf_counter()
    for number in range(0, len(records), MICRO_BATCH):
        store.coding.unpacked(records[number : number + MICRO_BATCH], length, lambda tensor: tensor)  # type: ignore[arg-type]
    return first, total, (time.perf_counter() - started) / len(records)


def beside_teacher(root: Path, ids: Ids, num_bytes: int, length: int, repeats: int) -> Row:
    """Return samples/s with a teacher's cache beside the tokens, with as many bytes, and without."""
    found: dict[str, list[float]] = {"without": [], "with": [], "floor": [], "unpack_s": []}
    count = len(ids) - MICRO_BATCH
    for _ in range(repeats):
        first, total = in_child(read_ours, root, ids, 0, None, None)
        found["without"].append(count / (total - first))
        for name, floor in (("with", False), ("floor", True)):
            read = partial(read_with_teacher, floor=floor)
            first, total, unpack = in_child(read, root, ids, 0, num_bytes, length)
            found[name].append(count / (total - first))
            found["unpack_s"].append(unpack)
    rates = {name: median(values) for name, values in found.items()}
    return {
        "bytes_a_sample": num_bytes,
        "samples_per_s": {name: rates[name] for name in ("without", "with", "floor")},
        "with_over_without": median(a / b for a, b in zip(found["with"], found["without"], strict=True)),
        "floor_over_without": median(a / b for a, b in zip(found["floor"], found["without"], strict=True)),
        "unpack_s_a_sample": rates["unpack_s"],
    }


def read_streaming(
    root: Path, ids: Ids, workers: int, cache: Path | None, limit_gb: float | None
) -> tuple[float, float]:
    """Read all samples by mosaicml-streaming's dataset and loader, in the order that these choose.

    Returns the seconds to the first batch, and the seconds in total.
    """
    from streaming import Stream, StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    streams = [
        Stream(local=str(root / f"domain{number}" / "train"))
        if cache is None
        else Stream(remote=str(root / f"domain{number}" / "train"), local=str(cache / f"domain{number}"))
        for number in range(NUM_DOMAINS)
    ]
    limit = None if limit_gb is None else int(limit_gb * 1e9)
    dataset = StreamingDataset(streams=streams, shuffle=True, batch_size=MICRO_BATCH, cache_limit=limit)
    started = time.perf_counter()
    return _drain(started, StreamingDataLoader(dataset, batch_size=MICRO_BATCH, num_workers=workers))


class _Mapped(Dataset[torch.Tensor]):
    """The samples as one memory-mapped matrix without any checks, which bounds the speed of every reader."""

    def __init__(self, path: Path, length: int) -> None:
        self._path, self._length = path, length
        self._tokens: Any = None

    def __getitem__(self, sample_id: int) -> torch.Tensor:
        if self._tokens is None:
            self._tokens = np.memmap(self._path, np.uint16, mode="r").reshape(-1, self._length)
        return torch.from_numpy(self._tokens[sample_id].astype(np.int64))


def read_mapped(root: Path, ids: Ids, workers: int, length: int) -> tuple[float, float]:
    """Read by a DataLoader over a memory map. Returns the seconds to the first batch, and the seconds in total."""
    started = time.perf_counter()
    batches = ids.reshape(-1, MICRO_BATCH).tolist()
    return _drain(started, DataLoader(_Mapped(root / "flat.bin", length), batch_sampler=batches, num_workers=workers))


def _drain(started: float, batches: Any) -> tuple[float, float]:
    iterator: Iterator[Any] = iter(batches)
    next(iterator)
    first = time.perf_counter() - started
    for _ in iterator:
        pass
    return first, time.perf_counter() - started


def in_child(read: Callable[..., tuple[float, ...]], *arguments: Any) -> Any:
    """Call `read` in a new process and return its times; so readers share no memory, workers or caches."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _fork_workers) as pool:
        return pool.submit(read, *arguments).result()


def _fork_workers() -> None:
    """Let the other loaders fork their workers, from a spawned process too."""
    multiprocessing.set_start_method("fork", force=True)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # of streaming's loader


@contextmanager
def scratch(wanted: bool) -> Iterator[Path | None]:
    """Yield a new temporary directory for a cache, or None if none is wanted."""
    if not wanted:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as directory:
        yield Path(directory)


def measure(root: Path, ids: Ids, length: int, options: argparse.Namespace) -> list[Row]:
    """Return a row for each reader, number of workers and kind of cache, with medians of the repeats."""
    rows: list[Row] = []
    total_bytes = len(ids) * length * 2
    small_cache_gb = max(total_bytes / 4, 8.0 * SHARD_BYTES) / 1e9
    for workers in (0, 2):
        for source, limit in (("local", None), ("cache", None), ("cache with a limit", small_cache_gb)):
            readers: dict[str, Callable[..., tuple[float, float]]] = {"ours": read_ours, "streaming": read_streaming}
            times_by_reader: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
            for _ in range(options.repeats):  # in turn, so that a change of the machine's speed affects all alike
                for name, read in readers.items():
                    with scratch(source != "local") as cache:
                        times_by_reader[name].append(in_child(read, root, ids, workers, cache, limit))
                if source == "local":
                    mapped = in_child(read_mapped, root, ids, workers, length)
                    times_by_reader.setdefault("memory map", []).append(mapped)
            for name, times in times_by_reader.items():
                seconds = median(
                    total - first for first, total in times
                )  # of other loaders, the workers' start is in first_batch_s
                num_samples = len(ids) - MICRO_BATCH
                rows.append(
                    {
                        "reader": name,
                        "workers": workers,
                        "data": source,
                        "samples_per_s": num_samples / seconds,
                        "tokens_per_s": num_samples * length / seconds,
                        "first_batch_s": median(first for first, _ in times),
                    }
                )
    return rows


def planning(num_domains: int) -> tuple[float, float]:
    """Plan an interval of 1,000 steps x 1,024 samples, and return the seconds and the peak memory in bytes."""
    orders = [DomainOrder(f"d{number}", [16_384] * 8, seed=0) for number in range(num_domains)]
    entries: Any = [{"name": order.name, "num_samples": order.num_samples, "sha": ""} for order in orders]
    offsets = np.arange(num_domains) * orders[0].num_samples
    fresh = IntervalState.new(entries, seed=0)
    proportions = np.random.default_rng(0).dirichlet(np.ones(num_domains)).tolist()
    started = time.perf_counter()
    state = fresh.advance(proportions, PLANNED_SAMPLES)
    state.seal(interval_ids(orders, offsets, state))
    seconds = time.perf_counter() - started
    for order in orders:
        order._pass = None  # planned again, to measure its memory
    tracemalloc.start()
    interval_ids(orders, offsets, state)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, peak


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all readers and the planning, print tables and write the JSON file. Returns 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--samples", type=int, default=16_384, help="samples of an interval (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="number of readings of each kind (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args(arguments)
    unit = MICRO_BATCH * NUM_DOMAINS
    if options.samples < 64 * unit or options.samples % unit:
        parser.error(f"--samples is {options.samples}: give a multiple of {unit}, {64 * unit} or more")
    directory = Path(tempfile.mkdtemp(prefix="bench-loader-"))
    try:
        make_data(directory, options.samples, options.sequence_length)
        dataset = MixtureDataset(directory, [f"domain{number}" for number in range(NUM_DOMAINS)])
        np.stack([dataset[i]["input_ids"].numpy().astype(np.uint16) for i in range(len(dataset))]).tofile(
            directory / "flat.bin"
        )
        ids = order_of(dataset, options.samples)
        rows = measure(directory, ids, options.sequence_length, options)
        num_bytes = make_teacher_cache(directory, dataset)
        teacher = beside_teacher(directory, ids, num_bytes, options.sequence_length, options.repeats)
    finally:
        shutil.rmtree(directory)
    plans = {number: planning(number) for number in (10, 100, 1000)}
    result = {**summarise(rows, plans), "teacher_cache": teacher}
    show(result, Console())
    if options.json:
        write_text(options.json, json.dumps(result, indent=1) + "\n")
    return 0


def summarise(rows: list[Row], plans: dict[int, tuple[float, float]]) -> Row:
    """Return the content of the JSON file."""
    speed = {(row["reader"], row["workers"], row["data"]): row["samples_per_s"] for row in rows}
    return {
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in ("torch", "numpy", "mosaicml-streaming")},
        "ours_over_streaming": {
            str(workers): speed["ours", workers, "local"] / speed["streaming", workers, "local"] for workers in (0, 2)
        },
        "first_batch_s": {
            str(row["workers"]): row["first_batch_s"]
            for row in rows
            if (row["reader"], row["data"]) == ("ours", "local")
        },
        "planning_s": {str(number): seconds for number, (seconds, _) in plans.items()},
        "planning_peak_bytes": {str(number): peak for number, (_, peak) in plans.items()},
        "cases": rows,
    }


def show(result: Row, console: Console) -> None:
    """Print the result as a table, and the planning as lines."""
    table = Table("reader", "workers", "data", "samples/s", "tokens/s", "first batch ms")
    for row in result["cases"]:
        table.add_row(
            row["reader"],
            str(row["workers"]),
            row["data"],
            f"{row['samples_per_s']:,.0f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{1e3 * row['first_batch_s']:.1f}",
        )
    console.print(table)
    teacher = result["teacher_cache"]
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in teacher["samples_per_s"].items())
    console.print(
        f"a teacher's cache beside the tokens, samples/s: {rates}; with over without "
        f"{teacher['with_over_without']:.2f}, the floor {teacher['floor_over_without']:.2f}; unpacking takes "
        f"{1e6 * teacher['unpack_s_a_sample']:.0f} us a sample"
    )
    for number, seconds in result["planning_s"].items():
        peak = result["planning_peak_bytes"][number] / 1e6
        console.print(f"planning {PLANNED_SAMPLES:,} samples over {number} domains: {seconds:.2f} s, {peak:.0f} MB")


if __name__ == "__main__":
    sys.exit(main())
