"""One long sample a step on 1, 2 and 4 ranks that share it: seconds, tokens/s, and memory of a rank and of all.

    python -m tools.bench.long_samples --out DIR [--length 16384] [--steps 3] [--json FILE]

Each is a run of its own through the launcher, on models of random weights (teacher 5 M and student 2 M parameters) and
text of the installed Python packages. The first step of a run is left out of the mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddk_ds.command_line import positive
from ddk_ds.comparison.method_stages import launch
from ddk_ds.version import versions
from tools.bench.small_run import make_workspace, run_here, write_config

RANKS = (1, 2, 4)
SOURCES = {"python": "stdlib:*.py", "cpp": "package:torch/include/ATen/*.h", "mathematics": "package:sympy/**/*.py"}
SHAPES = {"teacher": (256, 6), "student": (192, 4)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all sizes and print the table as Markdown; return 1 if a run fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="new directory for data, models and runs")
    parser.add_argument("--length", type=positive, default=16_384, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=3, help="steps that are measured (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    workspace = prepare(options.out, options.length)
    rows = []
    for ranks in RANKS:
        config = write_config(
            workspace,
            options.out,
            name=f"ranks-{ranks}",
            data={"path": str(options.out / "long"), "sequence_length": options.length, "validation_samples": 1},
            train={"global_batch_samples": 1, "micro_batch_samples": 1, "sequence_parallel": ranks},
            stop={"steps": options.steps + 1},
            mixture={"interval_steps": options.steps + 1},
            optimizer={"warmup_steps": 0},
        )
        log = options.out / f"ranks-{ranks}.log"
        if launch(config, [], ranks, log):
            print(f"the run on {ranks} ranks failed: see {log}", file=sys.stderr)
            return 1
        rows.append(measured(options.out / f"runs/ranks-{ranks}", ranks))
    print(table(rows))
    if options.json is not None:
        found = {"length": options.length, "rows": rows, "versions": versions()}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def prepare(folder: Path, length: int) -> Path:
    """Write tokenizer, models and long samples to `folder`, and return it."""
    make_workspace(folder)
    for name, (hidden, layers) in SHAPES.items():
        shape = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers}
        shape |= {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 3 * hidden}
        config = folder / f"long-{name}.json"
        config.write_text(json.dumps(shape | {"max_position_embeddings": length, "tie_word_embeddings": True}))
        new = ["--tokenizer", str(folder / "tokenizer"), "--out", str(folder / f"long-{name}")]
        run_here("init", "--config", str(config), *new)
        (folder / name).rename(folder / f"short-{name}")
        (folder / f"long-{name}").rename(folder / name)
    cut = ["--sequence-length", str(length), "--validation-samples", "1", "--workers", "1"]
    recipe, tokenizer = folder / "long.yaml", str(folder / "tokenizer")
    # Enough for some dozens of samples: a small run's own text is less than one of 16,384 tokens.
    domains = {name: {"sources": [source], "max_bytes": 100 * length} for name, source in SOURCES.items()}
    recipe.write_text(json.dumps({"domains": domains}))  # JSON is YAML too
    run_here("prepare", "--recipe", str(recipe), "--tokenizer", tokenizer, "--out", str(folder / "long"), *cut)
    return folder


def measured(run: Path, ranks: int) -> dict[str, Any]:
    """Return the figures of a finished run."""
    records = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    seconds = statistics.mean(step["clock"]["step_s"] for step in steps[1:])
    return {
        "ranks": ranks,
        "step_s": round(seconds, 3),
        "tokens_per_s": round(sum(steps[-1]["domain_tokens"]) / seconds, 1),
        "peak_gb": max(step["clock"]["peak_memory_gb"] for step in steps),
        "loss": steps[-1]["loss"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| ranks of a sample | step, s | tokens/s | peak of a rank, GB | last loss |", "| ---: " * 5 + "|"]
    for row in rows:
        cells = [row["ranks"], row["step_s"], row["tokens_per_s"], row["peak_gb"], f"{row['loss']:.6f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
