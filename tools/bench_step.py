"""Time whole distillation steps side by side: this project's, bare passes of both models, and a plain two-engine loop.

python tools/bench_step.py --json docs/results/bench_step.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the project is not installed

from ddk_ds.errors import UserError
from ddk_ds.files import write_text
from tools.gpu_suite import describe
from tools.stages import free_port
from tools.step_cases import Case

ROOT = Path(__file__).resolve().parents[1]
IMPLEMENTATIONS = ("floor", "kd", "cpt", "full_logits")
LLAMA = {"model_type": "llama", "max_position_embeddings": 4096, "tie_word_embeddings": True}
# Layers, width, heads, MLP: a teacher of 21 M and a student of 5 M parameters beside their vocabularies; 7 B and 1 B.
SIZES = {
    "cpu": {"teacher": (12, 384, 6, 1024), "student": (6, 256, 4, 704)},
    "cuda": {"teacher": (32, 4096, 32, 11008), "student": (22, 2048, 32, 5632)},
    "quick": {"teacher": (2, 64, 4, 128), "student": (2, 32, 4, 64)},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 2 where a case failed."""
    options = _parse(arguments)
    result: dict[str, Any] = {**describe(options.device), "threads": options.threads, "cases": []}
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
            for case, ranks in _cases(options, Path(folder)):
                console.print(f"{case.implementation}, {ranks} ranks, {case.micro_batches} micro-batches")
                result["cases"].append(_measure(case, ranks, options.threads))
                _relate(result["cases"])
                if options.json is not None:
                    write_text(options.json, json.dumps(result, indent=1) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(_table(result))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--impl", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS), help="what to time"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--accumulation", type=int, nargs="+", default=[2], help="micro-batches a step (default: 2)")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step on one rank (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="of a sample (%(default)s)")
    parser.add_argument("--vocab", type=int, default=32000, help="tokens of the vocabulary (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed, after two more (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each rank on a CPU (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the tool itself")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(arguments)
    for number in options.accumulation:
        if options.tokens % (number * options.length):
            parser.error(
                f"--tokens {options.tokens} are no multiple of {number} micro-batches x --length {options.length}"
            )
    return options


def _cases(options: argparse.Namespace, folder: Path) -> list[tuple[Case, int]]:
    """Every case with its number of ranks; bare passes know one rank alone."""
    for name, (layers, width, heads, mlp) in SIZES["quick" if options.quick else options.device].items():
        shape = {
            "num_hidden_layers": layers,
            "hidden_size": width,
            "num_attention_heads": heads,
            "intermediate_size": mlp,
        }
        (folder / name).mkdir()
        config = LLAMA | shape | {"vocab_size": options.vocab}
        (folder / name / "config.json").write_text(json.dumps(config))
    precision = "bf16" if options.device == "cuda" else "fp32"
    return [
        (
            Case(
                implementation=implementation,
                folder=str(folder),
                micro_batches=accumulation,
                samples=options.tokens // (accumulation * options.length),
                length=options.length,
                vocab_size=options.vocab,
                precision=precision,
                steps=options.steps,
            ),
            ranks,
        )
        for accumulation in options.accumulation
        for ranks in options.ranks
        for implementation in options.impl
        if implementation != "floor" or ranks == 1
    ]


def _measure(case: Case, ranks: int, threads: int) -> dict[str, Any]:
    """Start the ranks of a case, wait for them, and return what rank 0 found. Raises UserError where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(ROOT / "tools/step_cases.py"), json.dumps(asdict(case)), str(result)]
        place = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": free_port()}
        workers = []
        for rank in range(ranks):
            ours = place | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": threads, "MASTER_ADDR": "127.0.0.1"}
            env = os.environ | {key: str(value) for key, value in ours.items()}
            with (Path(folder) / f"{rank}.txt").open("w") as output:
                workers.append(subprocess.Popen(command, env=env, stdout=output, stderr=output))
        codes = [worker.wait() for worker in workers]
        if any(codes):
            said = "\n".join((Path(folder) / f"{rank}.txt").read_text()[-1500:] for rank in range(ranks))
            raise UserError(f"{case.implementation} on {ranks} ranks ended with {codes}:\n{said}")
        found: dict[str, Any] = json.loads(result.read_text())
    del found["folder"]
    return {**found, "ranks": ranks, "tokens_per_s": found["tokens"] / found["step_s"]}


def _relate(cases: list[dict[str, Any]]) -> None:
    """Add each case's time over the bare passes of as many micro-batches on one rank."""
    for case in cases:
        floors = [c for c in cases if c["implementation"] == "floor" and c["micro_batches"] == case["micro_batches"]]
        if floors and case["ranks"] == 1:
            case["over_floor"] = case["step_s"] / floors[0]["step_s"]


def _table(result: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"{result['device']}, commit {result['commit']}", title_justify="left")
    numbers = ("ranks", "micro-batches", "tokens/s", "step, s", "over floor", "peak, GB")
    for head in ("implementation", *numbers, "parts, s"):
        table.add_column(head, justify="right" if head in numbers else "left")
    for case in result["cases"]:
        over = case.get("over_floor")
        table.add_row(
            *(case["implementation"], str(case["ranks"]), str(case["micro_batches"])),
            *(f"{case['tokens_per_s']:,.0f}", f"{case['step_s']:.3f}", "" if over is None else f"{over:.2f}"),
            *(f"{case['peak_bytes'] / 1e9:.2f}", ", ".join(f"{k} {v:.3f}" for k, v in case["parts_s"].items())),
        )
    return table


if __name__ == "__main__":
    raise SystemExit(main())
