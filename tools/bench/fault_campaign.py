"""Harm small real runs, restart them, and compare them with an undisturbed run.

python -m tools.bench.fault_campaign --runs 50 --seed 1 --json docs/results/fault_campaign.json

Each of --runs is started by the `deepspeed` launcher, harmed at a random moment and started again, sometimes on another
number of ranks. On the same number, its ledger must be the undisturbed one bit for bit; on another number, the samples
must be the same and the losses within 1e-5.

The other kinds fork their ranks from a server that has imported everything, where no launcher is harmed. A run that was
killed must resume to the undisturbed one's numbers; one whose files were damaged may be refused with one line. Nothing
prints a traceback, and no process is left.
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
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ddk_ds.files import write_text
from ddk_ds.version import versions
from tools.bench.damaged_files import damaged
from tools.bench.fault_cases import OPTIONS, RESULTS, ROUNDING, Case, Setting, compare, resumed_from
from tools.bench.faults import DISK, KINDS, MOMENTS, Fault, Job, intact_checkpoints, small_disk
from tools.bench.killed_launchers import launcher_faults
from tools.bench.operation_faults import full_disks, kills
from tools.bench.small_run import ROOT, write_config

# Kind -> (how many cases by default, of all its cases, an iterator over their outcomes).
NEW_KINDS: dict[str, tuple[int, Callable[[Setting, int, np.random.Generator], Iterator[Case]], str]] = {
    "kills": (2, kills, "kills at file operations of a first or a resumed start on 1 to 3 ranks"),
    "full-disks": (1, full_disks, "disks that are full from one writer on"),
    "launchers": (1, launcher_faults, "signals to the launcher that a user holds"),
    "damages": (2, damaged, "damaged files of an interrupted or a finished run's directory"),
}


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
    for name, (default, _, text) in NEW_KINDS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"number of {text} (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--keep", type=Path, help="directory in which the runs are kept (default: a temporary one)")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="faults-") if options.keep is None else nullcontext(options.keep) as name:
        folder, cases = Path(name).absolute(), list[Case]()
        outcomes = campaign(folder, options.runs, options.seed, (options.ranks, *options.other_ranks), console)
        head = {"seed": options.seed, **made_with()}
        write_result(options.json, folder, {**head, **summary(outcomes, cases)})
        for case in new_kinds(Setting(folder), options):
            cases.append(case)
            console.print(said(case), markup=False)
            write_result(options.json, folder, {**head, **summary(outcomes, cases)})
    result = summary(outcomes, cases)
    console.print(*([table(outcomes)] if outcomes else []), *([case_table(cases)] if cases else []), sep="\n")
    console.print("  ".join(f"{key} {value}" for key, value in result.items() if key not in ("faults", "cases")))
    passed = result["resumed"] == result["identical"] == result["runs"]
    broken = result["hangs"] or result["partial_checkpoints_loaded"] or result["broken"]
    return 0 if passed and not broken else 1


def write_result(path: Path | None, folder: Path, result: dict[str, Any]) -> None:
    """Write what is known so far, without the paths of this machine."""
    if path is not None:
        write_text(path, json.dumps(result, indent=1).replace(f"{folder}/", "") + "\n")


def made_with() -> dict[str, Any]:
    """Return the commit (None outside a checkout), the machine and the versions of a result."""
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "commit": git.stdout.strip() or None,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "accelerator": device},
        "versions": versions(),
    }


def new_kinds(setting: Setting, options: argparse.Namespace) -> Iterator[Case]:
    """Make the cases of each new kind, as many as the options say, and yield them."""
    for place, (name, (_, make, _)) in enumerate(NEW_KINDS.items()):
        yield from make(setting, getattr(options, name.replace("-", "_")), np.random.default_rng([options.seed, place]))


def said(case: Case) -> str:
    """Return a case as a line."""
    came = f"BROKEN: {', '.join(case.broken)}" if case.broken else f"{case.result} {case.line}"
    return f"{case.kind}: {case.fault}; ranks {case.ranks}, codes {case.exit_codes}, {case.seconds:.1f} s: {came}"


def campaign(folder: Path, runs: int, seed: int, ranks: tuple[int, ...], console: Console) -> list[Outcome]:
    """Harm `runs` runs, and return their outcomes. Kinds and moments alternate in a random order, so all come early.

    Runs begin on the first of `ranks`; half continue on that number, the others on any of them.
    """
    if not runs:
        return []
    rng = np.random.default_rng(seed)
    workspace = Setting(folder).workspace
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


def summary(outcomes: list[Outcome], cases: list[Case]) -> dict[str, Any]:
    """Return the counts and the outcomes for the JSON file."""
    return {
        "runs": len(outcomes),
        "resumed": sum(outcome.resumed for outcome in outcomes),
        "identical": sum(outcome.identical for outcome in outcomes),
        "hangs": sum(outcome.hang for outcome in outcomes),
        "partial_checkpoints_loaded": sum(outcome.partial_loaded for outcome in outcomes),
        "slowest_end_s": max((outcome.ended_s for outcome in outcomes), default=0.0),
        "broken": sum(bool(case.broken) for case in cases),
        "faults": [asdict(outcome) for outcome in outcomes],
        "cases": [asdict(case) for case in cases],
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


def case_table(cases: list[Case]) -> Table:
    """Return the table of the new kinds."""
    shown = Table(
        "kind", "cases", "resumed", "refused", "same output", "said", "not to be known", "broken", title="new kinds"
    )
    for kind in dict.fromkeys(case.kind for case in cases):
        of_kind = [case for case in cases if case.kind == kind]
        results = [sum(case.result == result and not case.broken for case in of_kind) for result in RESULTS]
        shown.add_row(kind, *map(str, (len(of_kind), *results, sum(bool(case.broken) for case in of_kind))))
    return shown


if __name__ == "__main__":
    sys.exit(main())
