"""Compare time, memory and error of the distillation loss with other projects' losses and the bare matmuls.

    python -m tools.bench.bench_kd_loss [--case 4096,50257,768,1600] --json bench.json --picture bench.png
    python -m tools.bench.bench_kd_loss --near-teacher --json near.json --picture near.png
    python -m tools.bench.bench_kd_loss --gamma 0 --json ce.json

Each computes CE + gamma * T^2 * KL(teacher || student) from hidden states, and its gradients to the student's hidden
states and head weight; with --gamma 0 the cross-entropy alone, beside other projects' layers for it. Projects that are
not installed (liger-kernel, quack-kernels, trl, torchtune), or need a GPU that is not here, are listed with the reason.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ddk_ds.command_line import reports_user_errors
from ddk_ds.engine.process_memory import held_bytes, peak_bytes, reset_peak
from ddk_ds.errors import ConfigError
from ddk_ds.files import write_text
from ddk_ds.version import commit
from tools.bench import kd_peers
from tools.bench.kd_peers import IMPLEMENTATIONS, NEAR_GAMMA, Case, Problem, Result

Row = dict[str, Any]
FLOORS = ("floor_whole", "floor_chunked")
NAMES = ("floor", *(name for name in IMPLEMENTATIONS if name not in FLOORS))
NEAR_NAMES = ("ours", "ours_model_dtype", "naive", "liger", "liger_ops", "trl")
NEAR_KL = [10 ** (1 - 5 * i / 8) for i in range(9)]  # 10 to 1e-4 nats per token
# Bounds of the relative errors of the loss and of its gradients, which "ours" must meet at every KL.
BOUNDS = {"loss_error": 1e-4, "grad_error": 5e-3}
COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#CC79A7", "#009E73")  # Okabe and Ito's
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
# Columns of the table of cases: title, and key in the JSON, unit and format.
COLUMNS = {
    "time s": ("time_s", 1, ".3f"),
    "wall s": ("wall_s", 1, ".3f"),
    "x floor": ("time_over_floor", 1, ".2f"),
    "x naive": ("time_over_naive", 1, ".2f"),
    "peak MB": ("peak_bytes", 1e6, ".0f"),
    "loss error": ("loss_error", 1, ".0e"),
    "grad error": ("grad_error", 1, ".0e"),
}


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns 0, 1 if this project's loss fails, or 2 after an error that the user can fix."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    return _run(options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", default=[], metavar="n,V,Hs,Ht[,dtype]", help="sizes; repeatable")
    parser.add_argument("--only", action="append", choices=NAMES, help="a loss to measure; repeatable (default: all)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="default: %(default)s")
    parser.add_argument(
        "--repeats", type=int, default=5, choices=range(1, 100), metavar="N", help="number of timed calls of each loss"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of CPU threads")
    parser.add_argument(
        "--gamma", type=float, default=0.5, help="weight of the KL; 0: cross-entropy alone (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="temperature of both softmaxes (default: %(default)s)"
    )
    parser.add_argument(
        "--near-teacher", action="store_true", help="measure the errors of the KL alone, from 10 to 1e-4 nats"
    )
    parser.add_argument(
        "--by-kernel", action="store_true", help="also the time of each loss's kernels, by torch's profiler"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="file for a picture; needs matplotlib")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> int:
    if options.picture and find_spec("matplotlib") is None:
        raise ConfigError("--picture needs matplotlib: pip install matplotlib, or leave it out")
    cases = [kd_peers.parse_case(text, options.device) for text in options.case]
    if options.near_teacher:
        key, rows = "near_teacher", near_teacher(cases[0] if cases else kd_peers.NEAR_CASE, options)
    else:
        key, rows = "cases", [row for case in cases or kd_peers.CASES[options.device] for row in measure(case, options)]
    if options.json:
        write_text(options.json, json.dumps({**_about(options), key: rows}, indent=1) + "\n")
    if options.picture:
        draw = _draw_near if options.near_teacher else _draw_cases
        draw(rows, importlib.import_module("matplotlib.pyplot")).savefig(options.picture, dpi=150)
    faults = [fault for row in rows if row["impl"].startswith("ours") for fault in _faults(row)]
    print("".join(f"error: {fault}\n" for fault in faults), end="", file=sys.stderr)
    return 1 if faults else 0


def _faults(row: Row) -> list[str]:
    if row["grad_error"] is None:
        return [f"{row['impl']}: {row['note']}"]
    exact = "kl" not in row or row["impl"] != "ours" or all(row[key] <= bound for key, bound in BOUNDS.items())
    return [] if exact else [f"ours is not exact at {row['kl']:.1e} nats: {[(key, row[key]) for key in BOUNDS]}"]


def _about(options: argparse.Namespace) -> Row:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    installed = {found.name.replace("_", "-").lower(): found.version for found in distributions()}
    return {
        "commit": commit(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu.get("model name", "CPU"),
        "gamma": options.gamma,
        "threads": options.threads,
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in cpu.get("flags", "").split()],
        "versions": {name: installed.get(name) for name in kd_peers.PACKAGES},
    }


def measure(case: Case, options: argparse.Namespace) -> list[Row]:
    """Measure every implementation on a case, print a table, and return a row for each."""
    torch.compiler.reset()  # for a second shape, the compiler would generate general and slower code
    problem = kd_peers.make_problem(case, options.device, options.gamma, options.temperature)
    rows = _compare(_wanted(NAMES, case, options.gamma, options.only), problem, case, options)
    ready = [row for row in rows if row["grad_error"] is not None]
    # In rounds, so that a change of the machine's speed affects all alike.
    rounds = [[_seconds(IMPLEMENTATIONS[row["impl"]].run, problem) for row in ready] for _ in range(options.repeats)]
    for row, *pairs in zip(ready, *rounds, strict=True):
        row["rounds_s"], walls = ([pair[i] for pair in pairs] for i in range(2))
        row["time_s"], row["wall_s"] = median(row["rounds_s"]), median(walls)
    floors = sorted((row for row in ready if row["impl"] in FLOORS), key=lambda row: row["time_s"])
    rows = [row for row in rows if row not in floors[1:]]
    peak = _peak_bytes if options.device == "cuda" else _peak_in_child
    for row in (row for row in ready if row in rows):
        row["peak_bytes"], fault = _attempt(peak, row["impl"], case, options)
        row["note"] += f"; peak memory: {fault}" if fault else ""
        if options.by_kernel:
            row["kernels_s"] = kernel_seconds(IMPLEMENTATIONS[row["impl"]].run, problem)
    for row in floors[:1]:
        row |= {"impl": "floor", "loss_error": None, "grad_error": None}
    bases = {row["impl"]: row["rounds_s"] for row in rows if row["impl"] in ("floor", "naive") and row["rounds_s"]}
    for row in (row for row in rows if row["rounds_s"]):
        row |= {f"time_over_{base}": ratio(row["rounds_s"], seconds) for base, seconds in bases.items()}
    table = Table(Column(no_wrap=True), *COLUMNS)
    for row in rows:
        cells = (_text(row[key] and row[key] / unit, form) for key, unit, form in COLUMNS.values())
        table.add_row(row["impl"], *cells)
    time_of = "the GPU's time" if options.device == "cuda" else f"CPU time of {options.threads} threads"
    _print(table, rows, time_of if options.gamma else f"cross-entropy alone, {time_of}")
    if options.by_kernel:
        Console().print(_kernel_table(rows))
    return rows


def kernel_seconds(run: Callable[[Problem], Result], problem: Problem) -> dict[str, float]:
    """Return the seconds of the ten slowest kernels of one call, on a CPU of the operators, by name."""
    on_gpu = problem.labels.is_cuda
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        run(problem)
        if on_gpu:
            torch.cuda.synchronize()
    microseconds = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    seconds = {event.key: getattr(event, microseconds) / 1e6 for event in profiler.key_averages()}
    return dict(sorted(seconds.items(), key=lambda pair: -pair[1])[:10])


def _kernel_table(rows: list[Row]) -> Table:
    table = Table("", Column("ms", justify="right"), "kernel", title=_title(rows[0]), title_justify="left")
    for row in rows:
        for name, seconds in row.get("kernels_s", {}).items():
            table.add_row(row["impl"], f"{seconds * 1e3:.2f}", escape(name[:120]))
    return table


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Return the median over rounds of a time over that of `base` in the same round.

    Neighbours of a shared machine slow whole rounds down, by other factors than the next.
    """
    return median(one / other for one, other in zip(times, base, strict=True))


def near_teacher(case: Case, options: argparse.Namespace) -> list[Row]:
    """Measure the errors of the KL alone while the student approaches the teacher.

    Returns a row for each KL and implementation.
    """
    if case.student != case.teacher:
        raise ConfigError(f"--case has sizes {case.student} and {case.teacher}: near the teacher both share one head")
    names, rows = _wanted(NEAR_NAMES, case, NEAR_GAMMA, options.only), []
    table = Table("KL [nats]", *names, pad_edge=False)
    for kl in NEAR_KL:
        part = _compare(names, kd_peers.make_near_problem(case, options.device, kl), case, options)
        rows += part
        cells = [f"{_text(row['loss_error'], '.0e')}/{_text(row['grad_error'], '.0e')}" for row in part]
        table.add_row(f"{part[0]['kl']:.1e}", *cells)
    _print(table, rows, "relative errors of the KL/of its gradients")
    return rows


def _wanted(names: Sequence[str], case: Case, gamma: float, only: Sequence[str] | None) -> list[str]:
    chosen = [name for name in names if name in (only or names)]
    chosen = [part for name in chosen for part in (FLOORS if name == "floor" else (name,))]
    chosen = [name for name in chosen if IMPLEMENTATIONS[name].computes(case, gamma)]
    if not chosen:
        raise ConfigError(f"--only {', '.join(only or ())} leaves nothing: give some of {', '.join(names)}")
    return chosen


def _compare(names: list[str], problem: Problem, case: Case, options: argparse.Namespace) -> list[Row]:
    """Call each implementation once, and return rows with its errors against float64, still without times."""
    target, rows = kd_peers.truth(problem), []
    shape: Row = {"device": options.device, "dtype": case.dtype, "n": case.n, "vocab": case.vocab}
    shape["hidden"] = [case.student, case.teacher]
    empty: Row = {"kl": target.kl}
    if problem.ce_weight:
        empty = dict.fromkeys(("rounds_s", *(key for key, *_ in COLUMNS.values())))
    for name in names:
        peer = IMPLEMENTATIONS[name]
        result, fault = None, "not measured: its kernels need a GPU"
        if not peer.gpu_only or options.device == "cuda":
            result, fault = _attempt(peer.run, problem)
        loss, grad = (None, None) if result is None else kd_peers.errors(result, target, peer, problem.kd_weight)
        rows.append(
            {"impl": name, **shape, **empty, "loss_error": loss, "grad_error": grad, "note": fault or peer.note}
        )
    return rows


def _attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """Call a function. Returns (value, "") or, if it raises, (None, reason), so that a failing peer is only a row."""
    try:
        return function(*arguments), ""
    except Exception as error:
        reason = "not installed" if isinstance(error, ImportError) else f"failed: {type(error).__name__}"
        return None, f"{reason}: {' '.join(str(error).split())[:160]}"


def _seconds(run: Callable[[Problem], Result], problem: Problem) -> tuple[float, float]:
    """Return CPU time of all threads and wall time of one call, in seconds; on a GPU, twice the GPU's time."""
    if not problem.labels.is_cuda:
        wall, cpu = time.perf_counter(), time.process_time()
        run(problem)
        return time.process_time() - cpu, time.perf_counter() - wall
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(5_000_000)  # keeps the GPU busy, as in training, while Python prepares the call
    start.record()
    run(problem)
    end.record()
    end.synchronize()
    return (start.elapsed_time(end) / 1e3,) * 2


def _peak_in_child(name: str, case: Case, options: argparse.Namespace) -> int:
    """Return the peak memory in bytes, measured in a new process, whose heap holds nothing of other calls."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_bytes, name, case, options).result()


def _peak_bytes(name: str, case: Case, options: argparse.Namespace) -> int:
    """Return the peak memory in bytes of a second call, without inputs and gradients.

    Memory that the first call has kept for the second is included.
    """
    torch.set_num_threads(options.threads)
    run = IMPLEMENTATIONS[name].run
    shapes = (case._replace(n=16, vocab=min(case.vocab, 256)), case)
    small, problem = (kd_peers.make_problem(s, options.device, options.gamma, options.temperature) for s in shapes)
    run(small)  # loads libraries, whose memory does not count
    torch.compiler.reset()
    before = _settled_bytes(options.device)
    run(problem)
    _settled_bytes(options.device)
    result = run(problem)
    return peak_bytes(options.device) - before - result.hidden_grad.nbytes - result.weight_grad.nbytes


def _settled_bytes(device: str) -> int:
    """Return the bytes in use after freed memory was given back, and begin a new peak there."""
    gc.collect()
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # freed blocks would be used again, and the peak would not show it
    reset_peak(device)
    return held_bytes(device)


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _title(row: Row) -> str:
    return "n {n}, V {vocab}, hidden sizes {hidden}, {dtype}".format(**row)


def _print(table: Table, rows: list[Row], content: str) -> None:
    table.title, table.title_justify = f"{_title(rows[0])}: {content}", "left"
    for column in table.columns[1:]:
        column.justify, column.overflow = "right", "fold"
    notes = dict.fromkeys(f"{row['impl']}: {row['note']}" for row in rows)
    Console().print(table, *notes, sep="\n", highlight=False, markup=False)


def _draw_near(rows: list[Row], plt: Any) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, (key, bound), quantity in zip(axes, BOUNDS.items(), ("KL", "its gradients"), strict=True):
        for name, colour, style in zip(NEAR_NAMES, COLOURS, ("o-", "s:", "D--", "^-", "<:", "v-"), strict=True):
            part = [row for row in rows if row["impl"] == name and row[key] is not None]
            x, y = [row["kl"] for row in part], [row[key] for row in part]
            axis.loglog(x, y, style, color=colour, fillstyle="none", label=name if part else f"{name}: no result")
        axis.axhline(bound, color="black", linestyle="--", label=f"bound of ours: {bound:g}")
        axis.set(xlabel="KL(teacher || student) [nats per token]", ylabel=f"relative error of {quantity}")
        axis.legend(fontsize="small")
    return figure


def _draw_cases(rows: list[Row], plt: Any) -> Any:
    cases = list(dict.fromkeys(_title(row) for row in rows))
    figure, axes = plt.subplots(len(cases), 2, figsize=(12, 3 * len(cases)), squeeze=False, layout="constrained")
    for pair, case in zip(axes, cases, strict=True):
        part = [row for row in reversed(rows) if _title(row) == case]
        colours = [COLOURS[0] if row["impl"].startswith("ours") else "#999999" for row in part]
        for axis, title in zip(pair, ("time s", "peak MB"), strict=True):
            key, unit, form = COLUMNS[title]
            numbers = [row[key] and row[key] / unit for row in part]
            bars = axis.barh([row["impl"] for row in part], [number or 0 for number in numbers], color=colours)
            axis.bar_label(bars, [_text(number, form) for number in numbers], padding=3)
            axis.margins(x=0.15)
        pair[0].set(title=case, xlabel="time [s]")
        pair[1].set_xlabel("peak memory without inputs and gradients [MB]")
    return figure


if __name__ == "__main__":
    sys.exit(main())
