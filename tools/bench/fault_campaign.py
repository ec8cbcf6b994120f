"""Harm small real runs, restart them, and compare them with an undisturbed run.

python -m tools.bench.fault_campaign --runs 50 --seed 1 --json docs/results/fault_campaign.json

Each run is started by the `deepspeed` launcher, harmed at a random moment and started again, sometimes on another
number of ranks. On the same number, its ledger must be the undisturbed one bit for bit; on another number, the samples
must be the same and the losses within 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ddk_ds.version import versions
from tools.bench.faults import DISK, KINDS, MOMENTS, Fault, Job, intact_checkpoints, small_disk
from tools.bench.small_run import ROOT, make_workspace, without_clock, write_config

# Two and a half intervals, and a checkpoint every second step. The rounding noise of near-zero gradients differs
# between numbers of ranks; with AdamW's usual epsilon it would become steps as large as the learning rate.
OPTIONS: dict[str, Any] = {
    "mixture": {"interval_steps": 4},
    "stop": {"steps": 10},
    "checkpoint": {"every_steps": 2, "keep_last": 3},
    "optimizer": {"eps": 1e-5},
    "train": {"global_batch_samples": 12, "micro_batch_samples": 2},
}
ROUNDING = 1e-5
_ROUNDED = ("loss", "ce", "kl", "grad_norm", "student_ppl", "ratio", "proportions")


@dataclass(frozen=True)
class Outcome:
    """The result of one harmed run."""

    kind: str
    moment: str
    harmed_in: str
    """Phase in the run's record right after the fault; empty if it had no record yet."""
    ranks: tuple[int, int]
    """Number of ranks before and after the fault."""
    exit_code: int | None
    """Exit code of the harmed start; None if it hung and was killed."""
    ended_s: float
    """Seconds from the fault to the end of the last process."""
    resumed: bool
    """True if the second start ran to the end."""
    from_step: int
    """Step that the second start resumed from; 0 for the beginning."""
    identical: bool
    """True if the ledger is that of the undisturbed run, within ROUNDING on another number of ranks."""
    largest_difference: float
    """Largest relative difference of losses, gradient norms, perplexities and proportions."""
    partial_loaded: bool
    """True if the second start loaded a checkpoint that is not intact."""
    hang: bool
    """True if one of the two starts had to be killed."""


def main() -> int:
    """Run the campaign. Returns 0 if every run resumed and is identical, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--runs", type=int, default=50, help="number of runs, each with one fault (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of kinds, moments and numbers of ranks")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks of every run up to its fault")
    parser.add_argument(
        "--other-ranks", type=int, nargs="*", default=[1, 3], help="numbers of ranks with which some runs continue"
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--keep", type=Path, help="directory in which the runs are kept (default: a temporary one)")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="faults-") if options.keep is None else nullcontext(options.keep) as folder:
        ranks = (options.ranks, *options.other_ranks)
        outcomes = campaign(Path(folder).absolute(), options.runs, options.seed, ranks, console)
    result = summary(outcomes)
    console.print(table(outcomes))
    console.print("  ".join(f"{key} {value}" for key, value in result.items() if key != "faults"))
    if options.json is not None:
        options.json.write_text(json.dumps({"seed": options.seed, **made_with(), **result}, indent=1) + "\n")
    passed = result["resumed"] == result["identical"] == result["runs"]
    return 0 if passed and not result["hangs"] and not result["partial_checkpoints_loaded"] else 1


def made_with() -> dict[str, Any]:
    """Return the commit (None outside a checkout), the machine and the versions of a result."""
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "commit": git.stdout.strip() or None,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "accelerator": device},
        "versions": versions(),
    }


def campaign(folder: Path, runs: int, seed: int, ranks: tuple[int, ...], console: Console) -> list[Outcome]:
    """Harm `runs` runs, and return their outcomes. Kinds and moments alternate in a random order, so all come early.

    Runs begin on the first of `ranks`; half continue on that number, the others on any of them.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    workspace = make_workspace(folder / "workspace") if not (folder / "workspace").exists() else folder / "workspace"
    reference = Job(
        write_config(workspace, folder, name="undisturbed", **OPTIONS), folder / "runs/undisturbed", ranks[0]
    )
    if not (reference.run_dir / "summary.json").exists():
        reference.finish()
    pairs = [(kind, moment) for kind in KINDS for moment in MOMENTS[kind]]
    outcomes: list[Outcome] = []
    while len(outcomes) < runs:
        for number in rng.permutation(len(pairs))[: runs - len(outcomes)]:
            kind, moment = pairs[number]
            delay_s = float(rng.uniform(0, 0.02 if moment in ("controller", "checkpoint") else 0.15))
            fault = Fault(kind, moment, step=int(rng.integers(1, 10)), delay_s=delay_s, rng=rng)
            after = ranks[0] if rng.integers(2) else int(rng.choice(ranks))
            outcomes.append(run_one(folder, workspace, len(outcomes), fault, (ranks[0], after), reference.run_dir))
            last = outcomes[-1]
            console.print(
                f"{len(outcomes):3d}/{runs}  {kind} in {moment} ({last.harmed_in}), {ranks[0]} -> {after} ranks: code "
                f"{last.exit_code} after {last.ended_s:.1f} s, resumed {last.resumed} from step {last.from_step}, "
                f"identical {last.identical} ({last.largest_difference:.1e})"
            )
    return outcomes


def run_one(
    folder: Path, workspace: Path, number: int, fault: Fault, ranks: tuple[int, int], reference: Path
) -> Outcome:
    """Start a run, harm it, start it again, and compare it with the `reference` run."""
    name = f"run-{number:03d}"
    with small_disk(folder / name) if fault.kind == DISK else nullcontext(folder / "runs") as runs:
        config = write_config(workspace, folder, name=name, output_dir=str(runs), **OPTIONS)
        job = Job(config, runs / name, ranks[0])
        harmed_in, began = fault.strike(job)
        exit_code = job.end_by_itself()
        ended_s = time.monotonic() - began
        fault.clear_up(job)
        intact = intact_checkpoints(job.run_dir)
        again = Job(config, runs / name, ranks[1])
        finished, started = True, time.time()
        try:
            again.finish()
        except (AssertionError, TimeoutError) as error:
            finished = False
            (folder / f"{name}.failed.txt").write_text(str(error))
        source = resumed_from(job.run_dir, started)
        difference, same = compare(job.run_dir, reference) if finished else (float("nan"), False)
        return Outcome(
            kind=fault.kind,
            moment=fault.moment,
            harmed_in=harmed_in,
            ranks=ranks,
            exit_code=exit_code,
            ended_s=round(ended_s, 2),
            resumed=finished,
            from_step=0 if source is None else int(source.name.removeprefix("step-")),
            identical=same and (difference == 0.0 if ranks[0] == ranks[1] else difference <= ROUNDING),
            largest_difference=difference,
            partial_loaded=source is not None and source not in intact,
            hang=exit_code is None or again.killed,
        )


def resumed_from(run_dir: Path, since: float) -> Path | None:
    """Return the checkpoint from which a start after `since` resumed.

    It is None if the run began anew, or if nothing was left to do.
    """
    path = run_dir / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    paths = [event["path"] for event in events if event["event"] == "resume" and event["time_s"] >= since]
    return Path(paths[-1]) if paths else None


def compare(run_dir: Path, reference: Path) -> tuple[float, bool]:
    """Return the largest relative difference of the rounded numbers, and True if all else in the ledgers is equal."""
    ours, theirs = without_clock(run_dir), without_clock(reference)
    if len(ours) != len(theirs):
        return float("nan"), False
    worst, same = 0.0, True
    for line, expected in zip(ours, theirs, strict=True):
        for key in line.keys() | expected.keys():
            left, right = line.get(key), expected.get(key)
            if key in _ROUNDED and left is not None and right is not None:
                a, b = (np.array([*x.values()] if isinstance(x, dict) else x, np.float64) for x in (left, right))
                worst = max(worst, float(np.max(np.abs(a - b) / np.maximum(np.abs(b), 1e-12))))
            else:
                same = same and left == right
    return worst, same


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Return the counts and the outcomes for the JSON file."""
    return {
        "runs": len(outcomes),
        "resumed": sum(outcome.resumed for outcome in outcomes),
        "identical": sum(outcome.identical for outcome in outcomes),
        "hangs": sum(outcome.hang for outcome in outcomes),
        "partial_checkpoints_loaded": sum(outcome.partial_loaded for outcome in outcomes),
        "slowest_end_s": max(outcome.ended_s for outcome in outcomes),
        "faults": [asdict(outcome) for outcome in outcomes],
    }


def table(outcomes: list[Outcome]) -> Table:
    """Return the table of outcomes by kind of fault."""
    shown = Table("fault", "runs", "resumed", "identical", "on other ranks", "moments", title="faults by kind")
    for kind in KINDS:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        if of_kind:
            counts = [len(of_kind), sum(o.resumed for o in of_kind), sum(o.identical for o in of_kind)]
            counts.append(sum(o.ranks[0] != o.ranks[1] for o in of_kind))
            moments = ", ".join(
                f"{moment} {count}" for moment, count in sorted(Counter(o.moment for o in of_kind).items())
            )
            shown.add_row(kind, *map(str, counts), moments)
    return shown


if __name__ == "__main__":
    sys.exit(main())
