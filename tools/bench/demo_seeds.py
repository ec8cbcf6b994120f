"""Run `make demo` with several seeds, and write how far the arms are apart: docs/results/demo.md has its tables.

python -m tools.bench.demo_seeds --out DIR

A seed decides the random weights of both models and the order of all data; the held-out documents are the same. Each
seed has its own directory DIR/<seed> with links to this clone, so that runs/ of the clone is left alone. The same
command continues.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ddk_ds.comparison.paired_tests import paired_difference, spread
from ddk_ds.run_files import read_summary

CLONE = Path(__file__).resolve().parents[2]
ARMS = {"DDK": "demo", "equal sampling": "demo-equal", "KD by size": "demo-kd"}
SCORES = {"mean ratio": "mean_ratio_after", "largest ratio": "max_ratio_after"}


def main() -> None:
    """Run what is missing and print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory that holds one demo for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds (default: 1 2 3)")
    options = parser.parse_args()
    for seed in options.seeds:
        subprocess.run(["make", "demo", f"SEED={seed}"], cwd=linked_clone(options.out / str(seed)), check=True)
    print(tables({seed: results(options.out / str(seed) / "runs") for seed in options.seeds}))


def linked_clone(directory: Path) -> Path:
    """Return `directory` with links to all of this clone but its runs and configs; these are copied."""
    if not directory.exists():
        directory.mkdir(parents=True)
        for path in CLONE.iterdir():
            if path.name not in ("runs", "configs", ".git"):
                (directory / path.name).symlink_to(path)
        shutil.copytree(CLONE / "configs", directory / "configs")  # a path in a file begins at the file's directory
    return directory


def results(runs: Path) -> dict[str, dict[str, Any]]:
    """Return the summary of each arm of one demo, with its largest ratio."""
    found = {arm: read_summary(runs / name) for arm, name in ARMS.items()}
    for summary in found.values():
        summary["max_ratio_after"] = max(domain["ratio_after"] for domain in summary["domains"])
    return found


def tables(by_seed: dict[int, dict[str, dict[str, Any]]]) -> str:
    """Return the tables by seed, of the differences to DDK, and by domain, as Markdown."""
    return "\n\n".join("\n".join(lines) for lines in (_by_seed(by_seed), _differences(by_seed), _by_domain(by_seed)))


def _by_seed(by_seed: dict[int, dict[str, dict[str, Any]]]) -> list[str]:
    lines = ["| score | arm | " + " | ".join(f"seed {seed}" for seed in by_seed) + " | mean | sd |"]
    lines.append("| --- | --- |" + " ---: |" * (len(by_seed) + 2))
    for score, key in SCORES.items():
        for arm in ARMS:
            values = spread(found[arm][key] for found in by_seed.values())
            cells = [f"{value:.3f}" for value in (*values.values, values.mean)]
            lines.append(f"| {score} | {arm} | {' | '.join(cells)} | {_cell(values.sd)} |")
    return lines


def _differences(by_seed: dict[int, dict[str, dict[str, Any]]]) -> list[str]:
    lines = ["| score | DDK minus | mean | 95 % interval | verdict |", "| --- | --- | ---: | ---: | --- |"]
    for score, key in SCORES.items():
        values = {arm: {seed: found[arm][key] for seed, found in by_seed.items()} for arm in ARMS}
        for arm in list(ARMS)[1:]:
            found = paired_difference(values["DDK"], values[arm])
            interval = f"{_cell(found.low)} to {_cell(found.high)}"
            lines.append(f"| {score} | {arm} | {_cell(found.mean)} | {interval} | {found.verdict} |")
    return lines


def _by_domain(by_seed: dict[int, dict[str, dict[str, Any]]]) -> list[str]:
    lines = ["| domain | teacher | ratio before | " + " | ".join(ARMS) + " | share DDK |"]
    lines.append("| --- |" + " ---: |" * (len(ARMS) + 3))
    rows: dict[str, list[list[float]]] = {}
    for found in by_seed.values():
        for i, domain in enumerate(found["DDK"]["domains"]):
            after = [found[arm]["domains"][i]["ratio_after"] for arm in ARMS]
            values = [domain["teacher_ppl"], domain["ratio_before"], *after, 100 * domain["token_share"]]
            rows.setdefault(domain["name"], []).append(values)
    for name, values in rows.items():
        means = [spread(column).mean for column in zip(*values, strict=True)]
        cells = [f"{means[0]:.1f}", *(f"{value:.3f}" for value in means[1:-1]), f"{means[-1]:.1f} %"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
