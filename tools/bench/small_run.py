"""A small run on real text: tokenizer, shards, two models, a configuration, and the hash of the ledger's numbers.

    python -m tools.bench.small_run --out DIR [--ranks 2] [--steps 40]

Two commits compute the same if they print the same hash on one machine. The fault campaign and the tests use the parts:
they are made with the project's own tools from the text of the installed Python packages.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ddk_ds.command_line import positive
from ddk_ds.comparison.method_stages import launch

ROOT = Path(__file__).resolve().parents[2]
RECIPE = {
    "domains": {
        "python": {"sources": ["stdlib:json/*.py", "stdlib:email/*.py"], "max_bytes": 150_000},
        "cpp": {"sources": ["package:torch/include/c10/core/*.h"], "max_bytes": 200_000},
        "mathematics": {"sources": ["package:sympy/core/*.py"], "max_bytes": 100_000},
    }
}
MODELS = {"teacher": (48, 3), "student": (32, 2)}


def run_tool(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `python <command>` from the project's root. Raises AssertionError with the output if `check` and it fails."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def run_here(name: str, *arguments: str) -> None:
    """Run a command of `ddk` in this process, which saves its imports. Raises AssertionError with what it printed."""
    with redirect_stdout(StringIO()) as printed, redirect_stderr(printed):
        code = importlib.import_module(f"ddk_ds.commands.{name}_command").main(arguments)
    assert code == 0, f"ddk {name} {arguments}\n{printed.getvalue()}"


def make_workspace(folder: Path) -> Path:
    """Write tokenizer/, shards/, teacher/ and student/ to `folder`, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(OmegaConf.to_yaml(OmegaConf.create(RECIPE)))
    tokenizer = str(folder / "tokenizer")
    run_here("tokenizer", "--recipe", str(recipe), "--vocab-size", "600", "--out", tokenizer)
    data = ["--recipe", str(recipe), "--tokenizer", tokenizer, "--out", str(folder / "shards")]
    run_here("prepare", *data, "--sequence-length", "64", "--validation-samples", "12", "--workers", "1")
    for name, (hidden, layers) in MODELS.items():
        shape = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 2 * hidden}
        config = folder / f"{name}.json"
        config.write_text(json.dumps(shape | {"tie_word_embeddings": name == "student"}))
        run_here("init", "--config", str(config), "--tokenizer", tokenizer, "--out", str(folder / name))
    return folder


def write_config(workspace: Path, folder: Path, **sections: Any) -> Path:
    """Write the configuration of a run with the workspace's models and data, and return its path.

    The run's directory will be below `folder`. `sections` are merged into the configuration.
    """
    values: dict[str, Any] = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "student": {"path": str(workspace / "student")},
        "teacher": {"path": str(workspace / "teacher")},
        "data": {
            **{"path": str(workspace / "shards"), "sequence_length": 64, "validation_samples": 12},
            "documents": "joined",
        },
        "mixture": {"interval_steps": 4, "ratio_cap": 10.0, "initial_floor": 0.05},
        "optimizer": {"learning_rate": 5e-3, "min_learning_rate": 5e-4, "warmup_steps": 2},
        "train": {"global_batch_samples": 8, "micro_batch_samples": 2, "precision": "fp32"},
        "stop": {"steps": 10},
        "checkpoint": {"every_steps": 3},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{values['name']}.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    return path


def without_clock(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's ledger without the values that depend on the clock."""
    records = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "clock"} for record in records]


def ledger_hash(run_dir: Path) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a run's ledger without its clock."""
    text = "\n".join(json.dumps(record, sort_keys=True) for record in without_clock(run_dir))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run DDK and print the hash of the ledger's numbers; return the launcher's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="new directory for data, models and the run")
    parser.add_argument("--ranks", type=positive, default=2, help="ranks of the run (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=40, help="optimizer steps (default: %(default)s)")
    options = parser.parse_args(arguments)
    workspace = make_workspace(options.out)
    config = write_config(workspace, options.out, stop={"steps": options.steps}, checkpoint={"every_steps": 15})
    log = options.out / "run.log"
    code = launch(config, [], options.ranks, log)
    if code:
        print(f"the run ended with exit code {code}: see {log}", file=sys.stderr)
        return code
    print(f"{options.steps} steps on {options.ranks} ranks: {ledger_hash(options.out / 'runs/run')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
