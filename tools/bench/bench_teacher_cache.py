"""Compare runs whose teacher is live, on the disk, or absent, and filling the cache with the bare teacher's forward.

    python -m tools.bench.bench_teacher_cache --json FILE [--ranks 1] [--draws 64] [--rounds 3]

Random models of the sizes of bench_step train on real text, in real runs by the launcher. The runs take turns, so that
a change of the machine's speed affects all alike; a step's seconds are the median of all its runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from ddk_ds.command_line import positive
from ddk_ds.comparison.method_stages import launch
from ddk_ds.files import write_text
from tools.bench.small_run import run_tool
from tools.bench.step_setting import SIZES, describe, make_models

Row = dict[str, Any]
RUNS = ("cpt", "kd", "cached")
WARM_UP = 2
RECIPE = {"domains": {"python": {"sources": ["stdlib:*.py"], "max_bytes": 2_000_000}}}
BARE = """
import sys, time, torch
from transformers import AutoModelForCausalLM
model, (batch, length, passes) = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(), map(int, sys.argv[2:])
ids = torch.randint(model.config.vocab_size, (passes + 2, batch, length))
for number, micro in enumerate(ids):
    if number == 2:
        start = time.perf_counter()
    with torch.inference_mode():
        model(micro, use_cache=False)
print(passes * batch * length / (time.perf_counter() - start))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and write the JSON file. Returns 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=SIZES, default="cpu", help="sizes of both models (default: %(default)s)")
    parser.add_argument("--vocab", type=positive, default=32000, help="default: %(default)s")
    parser.add_argument("--length", type=positive, default=512, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--samples", type=positive, default=8, help="samples of a step (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=8, help="timed steps of a run (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--ranks", type=positive, default=1, help="default: %(default)s")
    parser.add_argument("--draws", type=positive, default=64, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="data.num_workers of the runs (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="bench-teacher-cache-") as folder:
        result = measure(options, Path(folder), Console())
    Console().print(_table(result))
    if options.json:
        write_text(options.json, json.dumps(result, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace, folder: Path, console: Console) -> Row:
    """Return the content of the JSON file; the runs' directories are in `folder`."""
    make_models(folder, options.size, options.vocab, "fp32", "cpu")
    recipe = folder / "recipe.yaml"
    recipe.write_text(OmegaConf.to_yaml(OmegaConf.create(RECIPE)))
    run_tool(
        *("tools/prepare_data.py", "--recipe", str(recipe), "--tokenizer", str(folder / "tokenizer")),
        *("--out", str(folder / "shards"), "--validation-samples", "4", "--workers", "1"),
        *("--sequence-length", str(options.length)),
    )
    config = _write_config(options, folder)
    fills, bare = [], []
    clocks: dict[str, list[Row]] = {name: [] for name in RUNS}
    for number in range(options.rounds):
        console.print(f"round {number + 1} of {options.rounds}")
        fills.append(_fill(options, config, folder / f"cache-{number}", folder))
        bare.append(_bare(options, folder))
        for name in RUNS:
            clocks[name] += _run(options, config, name, number, folder)
    steps = {name: _step(of_run) for name, of_run in clocks.items()}
    return {
        **describe("cpu"),
        **{key: value for key, value in vars(options).items() if key != "json"},
        "runs": steps,
        "cached_over_cpt": steps["cached"]["step_s"] / steps["cpt"]["step_s"],
        "cached_memory_over_cpt_mb": 1e3 * (steps["cached"]["peak_gb"] - steps["cpt"]["peak_gb"]),
        "fill_tokens_per_s": median(fills),
        "bare_forward_tokens_per_s": median(bare),
        "fill_over_bare": median(fills) / median(bare),
    }


def _write_config(options: argparse.Namespace, folder: Path) -> Path:
    values = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "method": "kd",
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher")},
        "data": {
            "path": str(folder / "shards"),
            "sequence_length": options.length,
            "validation_samples": 4,
            "num_workers": options.workers,
        },
        "optimizer": {"warmup_steps": 2},
        "train": {
            "global_batch_samples": options.samples,
            "micro_batch_samples": _micro_batch(options),
            "precision": "fp32",
        },
        "stop": {"steps": WARM_UP + options.steps},
    }
    path = folder / "run.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    return path


def _micro_batch(options: argparse.Namespace) -> int:
    return max(1, options.samples // options.ranks // 2)


def _fill(options: argparse.Namespace, config: Path, cache: Path, folder: Path) -> float:
    """Fill a new cache with all samples that the runs draw; return the tokens/s of the teacher's passes."""
    samples = options.samples * (WARM_UP + options.steps)
    done = run_tool(
        *(
            "-c",
            "import sys; from ddk_ds.commands.console import main; sys.exit(main())",
            "teach",
            "--ranks",
            str(options.ranks),
            "--config",
            str(config),
        ),
        *("--samples", str(samples), f"teacher.cache.path={cache}", f"teacher.cache.draws={options.draws}"),
    )
    found = re.search(r"([\d,]+) tokens/s", done.stdout)
    assert found, done.stdout
    return float(found[1].replace(",", ""))


def _bare(options: argparse.Namespace, folder: Path) -> float:
    """Return the tokens/s of the plain teacher's forward with its logits, on as many processes as there are ranks."""
    numbers = (_micro_batch(options), options.length, 2 * options.steps)
    command = [sys.executable, "-c", BARE, str(folder / "teacher"), *map(str, numbers)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(options.ranks)]
    return sum(float(process.communicate()[0]) for process in processes)


def _run(options: argparse.Namespace, config: Path, name: str, number: int, folder: Path) -> list[Row]:
    """Make a run of one kind and return the clocks of its timed steps."""
    overrides = [f"name={name}-{number}", f"method={'cpt' if name == 'cpt' else 'kd'}"]
    overrides += ["teacher=null"] if name == "cpt" else []
    if name == "cached":
        cache = folder / f"cache-{number}"
        overrides += [f"teacher.cache.path={cache}", f"teacher.cache.draws={options.draws}"]
        overrides += ["teacher.cache.mode=read_only"]
    log = folder / f"{name}-{number}.log"
    started = time.monotonic()
    code = launch(config, overrides, options.ranks, log)
    assert code == 0, f"{name} after {time.monotonic() - started:.0f} s: {log.read_text()[-3000:]}"
    lines = map(json.loads, (folder / "runs" / f"{name}-{number}" / "ledger.jsonl").read_text().splitlines())
    clocks = [line["clock"] for line in lines if line["kind"] == "step"]
    return clocks[WARM_UP:]


def _step(clocks: list[Row]) -> Row:
    seconds = [clock["step_s"] for clock in clocks]
    names = [name for name in clocks[0] if name.endswith("_s") and name != "tokens_per_s"]
    return {
        "step_s": median(seconds),
        "spread_s": max(seconds) - min(seconds),
        "parts_s": {name: median(clock[name] for clock in clocks) for name in names if name != "step_s"},
        "peak_gb": max(clock["peak_memory_gb"] for clock in clocks),
    }


def _table(result: Row) -> Table:
    table = Table("run", "step, s", "over cpt", "peak, GB", "parts, s", title="a step with the teacher on the disk")
    base = result["runs"]["cpt"]["step_s"]
    for name, row in result["runs"].items():
        parts = ", ".join(f"{part[:-2]} {seconds:.3f}" for part, seconds in row["parts_s"].items())
        table.add_row(name, f"{row['step_s']:.3f}", f"{row['step_s'] / base:.2f}", f"{row['peak_gb']:.2f}", parts)
    table.caption = (
        f"filling {result['fill_tokens_per_s']:,.0f} tokens/s, bare forward "
        f"{result['bare_forward_tokens_per_s']:,.0f}: {result['fill_over_bare']:.2f}"
    )
    return table


if __name__ == "__main__":
    sys.exit(main())
