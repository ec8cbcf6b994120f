"""Time whole distillation steps side by side: this project's, bare passes of both models, a plain loop, TRL's trainers.

    python -m tools.bench.bench_step --json step.json --picture step.png
    python -m tools.bench.bench_step --trl-python trl-env/bin/python --json step.json --picture step.png

docs/benchmarks.md says what is compared, and how to make an environment for TRL.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from ddk_ds.command_line import positive
from ddk_ds.comparison.method_stages import free_port
from ddk_ds.drawing import WIDTH, bar_style, tidy
from ddk_ds.engine.flops import utilisation
from ddk_ds.errors import ConfigError, UserError
from ddk_ds.files import write_text
from tools.bench.step_setting import SIZES, Case, case_config, case_flops, describe, make_models

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[2]
OURS = ("floor", "kd", "cpt", "full_logits")
TRLS = ("trl", "trl_gkd")
# What it needs there beside TRL: this project's ddk_ds/engine/runtime.py, which starts its ranks too.
TRL_CHECK = """
import importlib.metadata, json, trl, trl.experimental.gkd, xxhash
trl.DistillationTrainer
print(json.dumps({name: importlib.metadata.version(name) for name in ("trl", "torch", "deepspeed", "transformers")}))
"""
NAMES = {
    "floor": "bare passes (floor)",
    "kd": "this project: CE + KL",
    "cpt": "this project: CE alone",
    "full_logits": "two engines, full logits",
    "trl": "TRL, chunked loss",
    "trl_gkd": "TRL, GKD",
}
# Key, unit, format, and what it is.
PANELS = (("tokens_per_s", 1.0, ",.0f", "tokens/s"), ("peak_bytes", 1e9, ".2f", "peak memory of a rank, GB"))
Row = dict[str, Any]


class RankFailed(UserError):
    """A rank of a case ended with an error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 2 where a case failed of anything but memory."""
    options = _parse(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    try:
        result = _run(options, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(_table(result))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--impl", nargs="+", choices=(*OURS, *TRLS), help="what to time (default: all that can run)")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="KEY=VALUE[,KEY=VALUE...]",
        help="time kd once more, with this changed in its configuration; repeatable",
    )
    parser.add_argument("--trl-python", type=Path, metavar="FILE", help="interpreter of an environment that has TRL")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument(
        "--accumulation", type=positive, nargs="+", default=[2], help="micro-batches a step (default: 2)"
    )
    parser.add_argument("--tokens", type=positive, default=4096, help="of a step on one rank (%(default)s)")
    parser.add_argument("--length", type=positive, default=512, help="of a sample (%(default)s)")
    parser.add_argument(
        "--vocab", type=positive, help="tokens of the vocabulary (32000; 1000 of the sizes host and quick)"
    )
    parser.add_argument("--steps", type=positive, default=5, help="timed, after two more (%(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="of each rank on a CPU (%(default)s)")
    parser.add_argument(
        "--size", choices=SIZES, help="of both models (default: the device's; tools/bench/step_setting.py)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="file for a picture; needs matplotlib")
    options = parser.parse_args(arguments)
    options.size = options.size or options.device
    options.vocab = options.vocab or (32000 if options.size == options.device else 1000)
    options.impl = options.impl or [*OURS, *(TRLS if options.trl_python else ())]
    if options.trl_python is None and set(options.impl) & set(TRLS):
        parser.error("TRL is timed in an environment of its own: name its interpreter by --trl-python")
    if options.vocab < 258:
        parser.error(f"--vocab {options.vocab}: the tokenizer has 256 bytes and 2 special tokens")
    for number in options.accumulation:
        if options.tokens % (number * options.length):
            parser.error(
                f"--tokens {options.tokens} are no multiple of {number} micro-batches x --length {options.length}"
            )
    return options


def _run(options: argparse.Namespace, console: Console) -> Row:
    """Measure every case; what has been measured is in the JSON file at any time."""
    if options.picture and find_spec("matplotlib") is None:
        raise ConfigError("--picture needs matplotlib: pip install matplotlib, or leave it out")
    result: Row = {**describe(options.device), "threads": options.threads, "cases": []}
    if set(options.impl) & set(TRLS):
        result["trl_environment"] = _check_trl(options.trl_python)
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        console.print("models of random weights")
        precision = "bf16" if options.device == "cuda" else "fp32"
        # In a process of its own: what that takes of a GPU or of the host is free again before anything is measured.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(make_models, Path(folder), options.size, options.vocab, precision, options.device).result()
        cases = _cases(options, folder, precision)
        for case in cases:
            case_config(case)  # a variant that is no configuration is known before anything is measured
        for case in cases:
            console.print(
                f"{case.impl} {', '.join(case.options)}, {case.ranks} ranks, {case.accumulation} micro-batches"
            )
            result["cases"].append(_measure(case, options, result["device"]))
            relate(result["cases"])
            if options.json is not None:
                write_text(options.json, json.dumps(result, indent=1) + "\n")
    if options.picture:
        draw(result, options.picture)
    return result


def _check_trl(python: Path) -> Row:
    """Versions in TRL's environment. Raises ConfigError where it cannot run the cases."""
    try:
        # From the root directory, so that it is that environment's packages which are found.
        found = subprocess.run([python.absolute(), "-c", TRL_CHECK], capture_output=True, text=True, cwd="/")
    except OSError as error:
        raise ConfigError(f"--trl-python {python}: cannot be run: {error}") from error
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ConfigError(
            f"--trl-python {python}: cannot import what TRL's cases need ({last}): "
            "pip install trl deepspeed datasets there (docs/benchmarks.md)"
        )
    versions: Row = json.loads(found.stdout.strip().splitlines()[-1])
    return versions


def _cases(options: argparse.Namespace, folder: str, precision: str) -> list[Case]:
    """Every case; bare passes know one rank alone."""
    return [
        Case(
            impl=impl,
            folder=folder,
            ranks=ranks,
            accumulation=accumulation,
            samples=options.tokens // (accumulation * options.length),
            length=options.length,
            vocab_size=options.vocab,
            precision=precision,
            steps=options.steps,
            options=tuple(filter(None, variant.split(","))),
        )
        for accumulation in options.accumulation
        for ranks in options.ranks
        for impl, variant in [*((impl, "") for impl in options.impl), *(("kd", one) for one in options.variant)]
        if impl != "floor" or ranks == 1
    ]


def _measure(case: Case, options: argparse.Namespace, device_name: str) -> Row:
    """A row of the results; one without numbers where memory ran out. Raises RankFailed where a rank fails."""
    row: Row = {"impl": case.impl, "ranks": case.ranks, "accumulation": case.accumulation}
    setting = {key: value for key, value in asdict(case).items() if key not in (*row, "folder")}
    nothing = dict.fromkeys(("tokens_per_s", "over_floor", "of_linear", "peak_bytes", "mfu", "step_s", "spread_s"))
    row |= {**nothing, "tokens": case.tokens, "parts_s": {}, "error": None, **setting}
    try:
        found = _start(case, options)
    except RankFailed as error:
        if "OutOfMemoryError" not in str(error):
            raise
        return {**row, "error": "out of memory"}
    seconds = statistics.median(found["steps_s"])
    names = dict.fromkeys(name for parts in found["parts_s"] for name in parts)
    return row | {
        "tokens_per_s": case.tokens / seconds,
        "peak_bytes": found["peak_bytes"],
        "mfu": utilisation(case_flops(case), seconds, device_name),
        "step_s": seconds,
        "spread_s": max(found["steps_s"]) - min(found["steps_s"]),
        "parts_s": {name: statistics.median(parts.get(name, 0.0) for parts in found["parts_s"]) for name in names},
    }


def _start(case: Case, options: argparse.Namespace) -> Row:
    """Start the ranks of a case, wait for them, and return what rank 0 found. Raises RankFailed where one fails."""
    ours: list[str | Path] = [sys.executable, "-m", "tools.bench.step_cases"]
    trls: list[str | Path] = [options.trl_python, "-m", "tools.bench.trl_peer"]
    place: Row = {"WORLD_SIZE": case.ranks, "LOCAL_WORLD_SIZE": case.ranks, "MASTER_PORT": free_port()}
    place |= {"OMP_NUM_THREADS": options.threads, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": ROOT}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [*(trls if case.impl in TRLS else ours), json.dumps(asdict(case)), result]
        logs = [Path(folder) / f"{rank}.txt" for rank in range(case.ranks)]
        workers = []
        for rank, log in enumerate(logs):
            env = os.environ | {key: str(value) for key, value in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            with log.open("w") as output:
                workers.append(subprocess.Popen(command, env=env, stdout=output, stderr=output))
        failed = wait_for(workers)
        if failed:
            said = "\n".join(f"rank {rank} ended with {code}:\n{_end(logs[rank])}" for rank, code in failed.items())
            raise RankFailed(f"{case.impl} on {case.ranks} ranks: {said}")
        found: Row = json.loads(result.read_text())
    return found


def _end(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-1500:]


def wait_for(workers: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Wait until all have ended; exit codes of the first that failed, by rank.

    The others are ended then, and all are if this is interrupted: a rank whose fellow is gone waits for it in vain.
    """
    try:
        while True:
            codes = [worker.poll() for worker in workers]
            failed = {rank: code for rank, code in enumerate(codes) if code}
            if failed or None not in codes:
                return failed
            time.sleep(0.1)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()


def relate(cases: Sequence[Row]) -> None:
    """Add to each case its relation to the bare passes, and to as many ranks of its own that cost one another nothing.

    Every rank has the same number of tokens, so both are relations of tokens/s: `over_floor` is ranks x the floor's on
    one rank over the case's, `of_linear` the case's over ranks x its own on one rank.
    """
    speed = {(c["impl"], *c["options"], c["ranks"], c["accumulation"]): c["tokens_per_s"] for c in cases}
    for case in cases:
        mine, ranks, accumulation = case["tokens_per_s"], case["ranks"], case["accumulation"]
        floor, alone = (
            speed.get(("floor", 1, accumulation)),
            speed.get((case["impl"], *case["options"], 1, accumulation)),
        )
        case["over_floor"] = ranks * floor / mine if floor and mine else None
        case["of_linear"] = mine / (ranks * alone) if alone and mine else None


def _table(result: Row) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"{result['device']}, commit {result['commit']}", title_justify="left")
    numbers = {
        "tokens/s": ("tokens_per_s", 1, ",.0f"),
        "step, s": ("step_s", 1, ".3f"),
        "over floor": ("over_floor", 1, ".2f"),
        "of linear": ("of_linear", 1, ".2f"),
        "MFU": ("mfu", 1, ".1%"),
        "peak, GB": ("peak_bytes", 1e9, ".2f"),
    }
    for head in ("implementation", "ranks", "micro-batches", *numbers, "parts, s"):
        table.add_column(head, justify="left" if head in ("implementation", "parts, s") else "right")
    for case in result["cases"]:
        cells = ("-" if case[key] is None else format(case[key] / unit, form) for key, unit, form in numbers.values())
        parts = ", ".join(f"{name} {value:.3f}" for name, value in case["parts_s"].items())
        table.add_row(
            " ".join([case["impl"], *case["options"]]),
            str(case["ranks"]),
            str(case["accumulation"]),
            *cells,
            case["error"] or parts,
        )
    return table


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture of the benchmark's result, bars by implementation, ranks and micro-batches, to `path`.

    Variants of a configuration are left to the table.
    """
    # Only here: numbers alone need no matplotlib.
    from matplotlib.figure import Figure

    cases = [case for case in result["cases"] if not case["options"]]
    impls = list(dict.fromkeys(case["impl"] for case in cases))
    kinds = list(dict.fromkeys((case["ranks"], case["accumulation"]) for case in cases))
    height = 1.4 + len(impls) * (0.25 + 0.22 * len(kinds))
    figure = Figure(figsize=(2 * WIDTH, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, (key, unit, form, what) in zip((left, right), PANELS, strict=True):
        for place, kind in enumerate(kinds):
            found = [case for case in cases if (case["ranks"], case["accumulation"]) == kind]
            _bars(axes, found, impls, place, len(kinds), (key, unit, form), label=_label(kind, kinds))
        axes.set_xlabel(what)
        axes.margins(x=0.18)
        tidy(axes, "x")
    left.set_yticks(range(len(impls)), [NAMES[impl] for impl in impls])
    left.invert_yaxis()
    one = cases[0]
    setting = (
        f"{result['device']}, {one['precision']}, {one['tokens'] // one['ranks']:,} tokens a step and rank, "
        f"samples of {one['length']:,}, vocabulary {one['vocab_size']:,}"
    )
    handles, labels = left.get_legend_handles_labels()
    look: dict[str, Any] = {"frameon": False, "fontsize": 9, "alignment": "left", "title_fontsize": 9}
    figure.legend(handles, labels, loc="outside upper left", ncols=4, title=setting, **look)
    figure.savefig(path, dpi=150)


def _label(kind: tuple[int, int], kinds: list[tuple[int, int]]) -> str:
    ranks, accumulation = kind
    text = f"{ranks} rank{'s' * (ranks > 1)}"
    several = len({number for _, number in kinds}) > 1
    return f"{text}, {accumulation} micro-batch{'es' * (accumulation > 1)}" if several else text


def _bars(
    axes: Axes,
    cases: list[dict[str, Any]],
    impls: list[str],
    place: int,
    places: int,
    column: tuple[str, float, str],
    label: str,
) -> None:
    """Bars of one number of ranks and micro-batches, the `place`-th of `places` beside one another."""
    key, unit, form = column
    thick = 0.8 / places
    at = [impls.index(case["impl"]) + (place - (places - 1) / 2) * thick for case in cases]
    values = [(case[key] or 0.0) / unit for case in cases]
    bars = axes.barh(at, values, thick, label=label, linewidth=0.5, **bar_style(place))
    words = [case["error"] or format(value, form) for case, value in zip(cases, values, strict=True)]
    axes.bar_label(bars, words, padding=3, fontsize=8)


if __name__ == "__main__":
    raise SystemExit(main())
