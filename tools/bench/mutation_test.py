"""Mutation test: change one operator, comparison or constant at a time, and see whether a unit test notices.

    uv pip install '.[mutation]'
    nice -n 19 python -m tools.bench.mutation_test --json docs/results/mutation.json [PATH ...]

A PATH is a key of `ROOMS`, or a file or directory of it; without one all are tested. Results of other files stay in
FILE, and so do the reasons that were written there at survivors. With --again only survivors of FILE that are not
equivalent are tried: after new tests, or with all tests of a room after a run with the quick ones of --tests.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import hypothesis

from ddk_ds.files import write_text
from tools.bench.mutant_runs import run_mutants
from tools.bench.mutants import ROOT, Mutant, mutants_of

# Tests of a second and more; others notice what they would.
_SLOW = (
    "test_planning_cost.py",
    "test_elastic_order.py",
    "test_bounds.py::test_floors_hold_in_every_interval",
    "test_cumulative_counts.py::test_any_proportions",
    "test_cumulative_counts.py::test_constant_proportions",
    "test_cumulative_counts.py::test_proportions_and_lengths_that_change_in_every_interval",
    "test_interval_state.py::test_the_record_is_small_plain_json",
)
# Source -> the tests that are to notice.
ROOMS: dict[str, tuple[str, ...]] = {
    "ddk_ds/mixture": ("tests/unit/mixture", *(f"--deselect=tests/unit/mixture/{name}" for name in _SLOW)),
    "ddk_ds/methods": (
        "tests/unit/test_methods.py",
        "tests/unit/test_method_losses.py",
        "tests/unit/test_cached_losses.py",
        "tests/unit/test_doremi_proxy.py",
    ),
    "ddk_ds/config/run_config.py": ("tests/unit/config/test_lengths.py", "tests/unit/config/test_config_paths.py"),
    "ddk_ds/data/held_out.py": ("tests/unit/data/test_data_packing.py",),
    "ddk_ds/data/mds.py": ("tests/unit/data/test_data_packing.py",),
    "ddk_ds/data/reading.py": ("tests/unit/data/test_data_packing.py",),
    "ddk_ds/data/spooled.py": ("tests/unit/data/test_data_packing.py",),
    "ddk_ds/data/teacher_cache.py": ("tests/unit/data/test_teacher_cache.py",),
    "ddk_ds/data/teacher_samples.py": (
        "tests/unit/data/test_teacher_samples.py",
        "tests/unit/data/test_teacher_cache.py",
    ),
    "ddk_ds/train/guard.py": ("tests/unit/train/test_guard.py",),
    "ddk_ds/train/step.py": ("tests/unit/train/test_train_step.py",),
    "ddk_ds/train/interval.py": ("tests/unit/train/test_interval.py",),
    "ddk_ds/train/run_dir.py": ("tests/unit/train/test_run_identity.py", "tests/unit/train/test_run_directory.py"),
    "ddk_ds/train/checkpoint/checkpoint_files.py": ("tests/unit/train/test_checkpoint_files.py",),
    # Activations are the estimate's (ddk_ds/engine), not the planner's.
    "ddk_ds/planner": (
        "tests/unit/planner",
        "--deselect=tests/unit/planner/test_memory.py::test_activations_are_torchs",
    ),
    # Triton's interpreter is slow, and its kernels are not changed here.
    "ddk_ds/kernels": ("tests/unit/kernels", "--ignore=tests/unit/kernels/test_triton_aot.py", "-k=not triton"),
}
# Triton compiles its kernels from their source, which a changed code object does not reach.
SKIPPED = ("ddk_ds/kernels/known_rows_triton.py", "ddk_ds/kernels/rows_triton.py")
# Where a room is a part of a file: its classes and functions. Outside of them known_points.py has published figures.
PARTS = {
    "ddk_ds/planner/known_points.py": (
        *("Point", "known_points", "_foundry", "_deepspeed", "_here"),
        *("_tokens_per_s_per_gpu", "_config", "dense_model", "profiled_model"),
    ),
    "ddk_ds/data/mds.py": ("pack", "token_dtype"),
    "ddk_ds/data/reading.py": ("Spool",),
}
SEED = 0


def _files(room: str) -> list[str]:
    paths = sorted((ROOT / room).rglob("*.py")) if (ROOT / room).is_dir() else [ROOT / room]
    return [name for path in paths if (name := str(path.relative_to(ROOT))) not in SKIPPED]


def _say(mutant: Mutant, noticed: bool) -> None:
    text = "killed" if noticed else f"survived {' -> '.join(mutant.difference())}"
    os.write(1, f"{mutant.file}:{mutant.line} {text}\n".encode())


def _entry(mutants: list[Mutant], tried: dict[Mutant, bool | None], old: dict[str, Any]) -> dict[str, Any]:
    """Return a file's results; a survivor keeps the reason that the file's old results give."""
    reasons = {(one["was"], one["now"]): one["reason"] for one in old.get("survivors", ())}
    survivors = []
    for one in mutants:
        if tried.get(one) is False:
            was, now = one.difference()
            survivors.append({"line": one.line, "was": was, "now": now, "reason": reasons.get((was, now), "")})
    results = [tried[one] for one in mutants if one in tried]
    killed, programs = results.count(True), len(results) - results.count(None)
    return {"mutants": len(mutants) - results.count(None), "tried": programs, "killed": killed, "survivors": survivors}


def _mutants(name: str) -> list[Mutant]:
    return [one for one in mutants_of(name) if one.part in PARTS.get(name, (one.part,))]


def _try(mutants: list[Mutant], tests: tuple[str, ...]) -> dict[Mutant, bool | None]:
    return dict(zip(mutants, run_mutants(mutants, tests, _say), strict=True)) if mutants else {}


def _commit() -> str:
    git = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _test_room(names: list[str], tests: tuple[str, ...], sample: int | None, results: dict[str, Any]) -> None:
    """Try the mutants of files, and put what became of them into `results`."""
    by_file = {name: _mutants(name) for name in names}
    mutants = [mutant for of_file in by_file.values() for mutant in of_file]
    random.Random(SEED).shuffle(mutants)
    commit = _commit()  # before hours in which another may be made
    tried = _try(mutants[:sample], tests)
    for name, of_file in by_file.items():
        results[name] = {"commit": commit, **_entry(of_file, tried, results.get(name, {}))}


def _test_again(names: list[str], tests: tuple[str, ...], results: dict[str, Any]) -> None:
    """Try the survivors of files that are not equivalent, and move those that are noticed now to the killed."""
    open_ones: dict[str, set[tuple[str, str]]] = {}
    for name in names:
        survivors = results.get(name, {}).get("survivors", ())
        open_ones[name] = {(s["was"], s["now"]) for s in survivors if not s["reason"].startswith("equivalent")}
    mutants = [one for name in names if open_ones[name] for one in _mutants(name)]
    commit = _commit()
    tried = _try([one for one in mutants if one.difference() in open_ones[one.file]], tests)
    noticed = {(one.file, *one.difference()) for one, result in tried.items() if result}
    for name in sorted({one.file for one in tried}):
        result = results[name]
        left = [one for one in result["survivors"] if (name, one["was"], one["now"]) not in noticed]
        result["killed"] += len(result["survivors"]) - len(left)
        result["survivors"], result["survivors_again_at"] = left, commit


def main() -> None:
    """Test the rooms that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="room, directory or file; default: all rooms")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="file of the results")
    parser.add_argument("--sample", type=int, help="try this many mutants of a room, drawn with a fixed seed")
    parser.add_argument("--tests", nargs="+", metavar="TEST", help="try with these instead of the room's tests")
    parser.add_argument("--again", action="store_true", help="try only FILE's survivors that are not equivalent")
    options = parser.parse_args()
    known = [name for room in ROOMS for name in _files(room)]
    if wrong := [path for path in options.paths if not any(name.startswith(path) for name in known)]:
        parser.error(f"{', '.join(wrong)}: not in the rooms that are tested ({', '.join(ROOMS)})")
    # Examples are the same for every mutant, and a failing one is not made smaller.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, deadline=None, phases=phases)
    hypothesis.settings.load_profile("mutants")
    os.environ["TRITON_INTERPRET"] = "1"  # as in tests/conftest.py, which would import much that is not needed
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    for room, of_room in ROOMS.items():
        tests = options.tests or of_room
        names = [name for name in _files(room) if name.startswith(tuple(options.paths) or "")]
        if names:
            if options.again:
                _test_again(names, tests, results)
            else:
                _test_room(names, tests, options.sample, results)
            write_text(options.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
