"""Compare the time of distillation steps: this project's, bare passes of both models, a plain loop, TRL's trainers.

    python -m tools.bench.bench_step --json step.json --picture step.png
    python -m tools.bench.bench_step --trl-python trl-env/bin/python --json step.json --picture step.png

docs/benchmarks.md describes what is compared, and how to make an environment for TRL.
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

from ddk_ds.command_line import command_parser, parse, positive, reports_user_errors
from ddk_ds.drawing import WIDTH, bar_style, tidy
from ddk_ds.engine.flops import utilisation
from ddk_ds.errors import ConfigError, UserError
from ddk_ds.files import write_text
from ddk_ds.launcher import free_port
from tools.bench.step_setting import EACH_OPTION, SIZES, Case, case_config, case_flops, describe, make_models

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[2]
OURS = ("floor", "kd", "cpt", "full_logits")
TRLS = ("trl", "trl_gkd")
# TRL's environment also needs the packages of ddk_ds/engine/runtime.py, which starts the ranks there.
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
# Panels of the picture: key of the JSON, unit, format and label.
PANELS = (("tokens_per_s", 1.0, ",.0f", "tokens/s"), ("peak_bytes", 1e9, ".2f", "peak memory of a rank, GB"))
Row = dict[str, Any]


class RankFailed(UserError):
    """A rank of a case ended with an error."""


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns 0, or 2 after an error; a case that runs out of memory is no error."""
    options = _parse(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    result = _run(options, console)
    console.print(_table(result))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, check=_lacking)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--impl", nargs="+", choices=(*OURS, *TRLS), help="cases to time (default: all that can run)")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="KEY=VALUE[,KEY=VALUE...]",
        help="time kd again with this change of its configuration; repeatable",
    )
    parser.add_argument(
        "--each-option", action="store_true", help="time kd again with each option (EACH_OPTION in step_setting.py)"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="train.precision (default: fp32 on a CPU, bf16 on CUDA)"
    )
    parser.add_argument("--trl-python", type=Path, metavar="FILE", help="interpreter of an environment that has TRL")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument(
        "--accumulation", type=positive, nargs="+", default=[2], help="micro-batches a step (default: 2)"
    )
    parser.add_argument(
        "--tokens", type=positive, default=4096, help="tokens of a step on one rank (default: %(default)s)"
    )
    parser.add_argument("--length", type=positive, default=512, help="tokens of a sample (default: %(default)s)")
    parser.add_argument(
        "--vocab", type=positive, help="size of the vocabulary (default: 32000; 1000 with the sizes host and quick)"
    )
    parser.add_argument(
        "--steps", type=positive, default=5, help="timed steps, after two untimed ones (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=positive, default=1, help="threads of each rank on a CPU (default: %(default)s)"
    )
    parser.add_argument(
        "--size", choices=SIZES, help="size of both models in tools/bench/step_setting.py (default: the device's)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="file for a picture; needs matplotlib")
    options = parse(parser, arguments)
    options.size = options.size or options.device
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    options.vocab = options.vocab or (32000 if options.size == options.device else 1000)
    options.variant += EACH_OPTION if options.each_option else ()
    options.impl = options.impl or [*OURS, *(TRLS if options.trl_python else ())]
    if options.vocab < 258:
        parser.error(f"--vocab {options.vocab}: the tokenizer has 256 bytes and 2 special tokens")
    for number in options.accumulation:
        if options.tokens % (number * options.length):
            parser.error(
                f"--tokens {options.tokens} are no multiple of {number} micro-batches x --length {options.length}"
            )
    return options


def _lacking(options: argparse.Namespace) -> str:
    lacks = options.trl_python is None and set(options.impl or ()) & set(TRLS)
    return "TRL is timed in an environment of its own: name its interpreter by --trl-python" if lacks else ""


def _run(options: argparse.Namespace, console: Console) -> Row:
    """Measure every case, and write the JSON file after each."""
    if options.picture and find_spec("matplotlib") is None:
        raise ConfigError("--picture needs matplotlib: pip install matplotlib, or leave it out")
    result: Row = {**describe(options.device), "threads": options.threads, "cases": []}
    if set(options.impl) & set(TRLS):
        result["trl_environment"] = _check_trl(options.trl_python)
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        console.print("models of random weights")
        # In another process, so that its memory on GPU and host is free again before anything is measured.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            sizes = (options.size, options.vocab, options.precision, options.device)
            pool.submit(make_models, Path(folder), *sizes).result()
        cases = _cases(options, folder)
        for case in cases:
            if ",".join(case.options) not in EACH_OPTION:
                case_config(case)  # raises an error of a variant before anything is measured
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
    """Return the versions in TRL's environment. Raises ConfigError if it cannot run the cases."""
    try:
        # From the root directory, so that only that environment's packages are imported.
        done = subprocess.run([python.absolute(), "-c", TRL_CHECK], capture_output=True, text=True, cwd="/")
    except OSError as error:
        raise ConfigError(f"--trl-python {python}: cannot be run: {error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ConfigError(
            f"--trl-python {python}: cannot import what TRL's cases need ({last}): "
            "pip install trl deepspeed datasets there (docs/benchmarks.md)"
        )
    versions: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return versions


def _cases(options: argparse.Namespace, folder: str) -> list[Case]:
    """Return every case; bare passes run only on one rank."""
    return [
        Case(
            impl=impl,
            folder=folder,
            ranks=ranks,
            accumulation=accumulation,
            samples=options.tokens // (accumulation * options.length),
            length=options.length,
            vocab_size=options.vocab,
            precision=options.precision,
            steps=options.steps,
            options=tuple(filter(None, variant.split(","))),
        )
        for accumulation in options.accumulation
        for ranks in options.ranks
        for impl, variant in [*((impl, "") for impl in options.impl), *(("kd", variant) for variant in options.variant)]
        if impl != "floor" or ranks == 1
    ]


def _measure(case: Case, options: argparse.Namespace, device_name: str) -> Row:
    """Measure a case, and return its row, without numbers if memory ran out or an option does not run here.

    Raises RankFailed if a rank fails without a changed option.
    """
    row: Row = {"impl": case.impl, "ranks": case.ranks, "accumulation": case.accumulation}
    setting = {key: value for key, value in asdict(case).items() if key not in (*row, "folder")}
    names = ("tokens_per_s", "over_floor", "of_linear", "peak_bytes", "reserved_bytes", "mfu", "step_s", "spread_s")
    row |= {**dict.fromkeys(names), "tokens": case.tokens, "parts_s": {}, "error": None, **setting}
    try:
        case_config(case)
        measured = _start(case, options)
    except ConfigError as error:  # of EACH_OPTION: FP8 wants bf16
        return {**row, "error": str(error)}
    except RankFailed as error:
        if "OutOfMemoryError" in str(error):
            return {**row, "error": "out of memory"}
        if not case.options:
            raise
        return {**row, "error": str(error).splitlines()[-1][:300]}
    seconds = statistics.median(measured["steps_s"])
    parts = dict.fromkeys(part for of in measured["parts_s"] for part in of)
    return row | {
        "tokens_per_s": case.tokens / seconds,
        "peak_bytes": measured["peak_bytes"],
        "reserved_bytes": measured["reserved_bytes"],
        "mfu": utilisation(case_flops(case), seconds, device_name),
        "step_s": seconds,
        "spread_s": max(measured["steps_s"]) - min(measured["steps_s"]),
        "parts_s": {part: statistics.median(of.get(part, 0.0) for of in measured["parts_s"]) for part in parts},
    }


def _start(case: Case, options: argparse.Namespace) -> Row:
    """Start the ranks of a case, wait for them, and return rank 0's result. Raises RankFailed if a rank fails."""
    ours: list[str | Path] = [sys.executable, "-m", "tools.bench.step_cases"]
    trls: list[str | Path] = [options.trl_python, "-m", "tools.bench.trl_peer"]
    variables: Row = {"WORLD_SIZE": case.ranks, "LOCAL_WORLD_SIZE": case.ranks, "MASTER_PORT": free_port()}
    variables |= {"OMP_NUM_THREADS": options.threads, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": ROOT}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [*(trls if case.impl in TRLS else ours), json.dumps(asdict(case)), result]
        logs = [Path(folder) / f"{rank}.txt" for rank in range(case.ranks)]
        workers = []
        for rank, log in enumerate(logs):
            own = variables | {"RANK": rank, "LOCAL_RANK": rank}
            env = os.environ | {key: str(value) for key, value in own.items()}
            with log.open("w") as output:
                workers.append(subprocess.Popen(command, env=env, stdout=output, stderr=output))
        failed = wait_for(workers)
        if failed:
            ends = "\n".join(f"rank {rank} ended with {code}:\n{_end(logs[rank])}" for rank, code in failed.items())
            raise RankFailed(f"{case.impl} on {case.ranks} ranks: {ends}")
        measured: Row = json.loads(result.read_text())
    return measured


def _end(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-1500:]


def wait_for(workers: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Wait for the end of all ranks. Returns the exit codes of the ranks that failed first, by rank.

    After a failure the other ranks are killed, since they would wait forever; so are all if this is interrupted.
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
    """Add to each case its time relative to the bare passes, and its speed relative to linear scaling.

    Every rank has the same number of tokens, so both are ratios of tokens/s: `over_floor` is ranks x the floor on one
    rank / the case, `of_linear` is the case / (ranks x the same case on one rank).
    """
    speed = {(c["impl"], *c["options"], c["ranks"], c["accumulation"]): c["tokens_per_s"] for c in cases}
    for case in cases:
        own, ranks, accumulation = case["tokens_per_s"], case["ranks"], case["accumulation"]
        floor = speed.get(("floor", 1, accumulation))
        one_rank = speed.get((case["impl"], *case["options"], 1, accumulation))
        case["over_floor"] = ranks * floor / own if floor and own else None
        case["of_linear"] = own / (ranks * one_rank) if one_rank and own else None


def _table(result: Row) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"{result['device']}, commit {result['commit']}", title_justify="left")
    numbers = {
        "tokens/s": ("tokens_per_s", 1, ",.0f"),
        "step, s": ("step_s", 1, ".3f"),
        "over floor": ("over_floor", 1, ".2f"),
        "of linear": ("of_linear", 1, ".2f"),
        "MFU": ("mfu", 1, ".1%"),
        "peak, GB": ("peak_bytes", 1e9, ".2f"),
        "reserved, GB": ("reserved_bytes", 1e9, ".2f"),
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
    """Write a picture with bars by implementation, ranks and micro-batches to `path`, without the variants of kd."""
    # Imported here, since only a picture needs matplotlib.
    from matplotlib.figure import Figure

    cases = [case for case in result["cases"] if not case["options"]]
    impls = list(dict.fromkeys(case["impl"] for case in cases))
    kinds = list(dict.fromkeys((case["ranks"], case["accumulation"]) for case in cases))
    height = 1.4 + len(impls) * (0.25 + 0.22 * len(kinds))
    figure = Figure(figsize=(2 * WIDTH, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, (key, unit, form, label) in zip((left, right), PANELS, strict=True):
        for index, kind in enumerate(kinds):
            of_kind = [case for case in cases if (case["ranks"], case["accumulation"]) == kind]
            _bars(axes, of_kind, impls, index, len(kinds), (key, unit, form), label=_label(kind, kinds))
        axes.set_xlabel(label)
        axes.margins(x=0.18)
        tidy(axes, "x")
    left.set_yticks(range(len(impls)), [NAMES[impl] for impl in impls])
    left.invert_yaxis()
    first = cases[0]
    setting = (
        f"{result['device']}, {first['precision']}, {first['tokens'] // first['ranks']:,} tokens a step and rank, "
        f"samples of {first['length']:,}, vocabulary {first['vocab_size']:,}"
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
    index: int,
    num_kinds: int,
    column: tuple[str, float, str],
    label: str,
) -> None:
    """Draw the bars of one number of ranks and micro-batches, which is kind `index` of `num_kinds`."""
    key, unit, form = column
    thick = 0.8 / num_kinds
    positions = [impls.index(case["impl"]) + (index - (num_kinds - 1) / 2) * thick for case in cases]
    values = [(case[key] or 0.0) / unit for case in cases]
    bars = axes.barh(positions, values, thick, label=label, linewidth=0.5, **bar_style(index))
    texts = [case["error"] or format(value, form) for case, value in zip(cases, values, strict=True)]
    axes.bar_label(bars, texts, padding=3, fontsize=8)


if __name__ == "__main__":
    raise SystemExit(main())
