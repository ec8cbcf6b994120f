"""Measure models on the paper's benchmarks, on held-out text by domain, and on CrossCodeEval (docs/evaluation.md).

ddk evaluate runs/demo/export models/teacher --suite paper --data data/benchmarks --allow-code-execution
ddk evaluate runs/demo/export --shards data/mine --out scores.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ddk_ds.command_line import command_parser, parse, positive, reports_user_errors
from ddk_ds.errors import ConfigError
from ddk_ds.evaluation.results import ModelResult, as_json, benchmark_table, code_table, domain_table
from ddk_ds.evaluation.suites import SUITES, Chosen, choose_benchmarks
from ddk_ds.files import nearest_existing, write_text
from ddk_ds.version import commit

if TYPE_CHECKING:
    from ddk_ds.evaluation.benchmark_run import Prepared, Request

PIPE_WIDTH = 240
"""Width of the tables when the output is no terminal."""


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and print the tables. Returns the exit code: 0, or 2 after an error that the user can fix."""
    options = parse_arguments(arguments)
    # Imports torch and transformers, which takes seconds that --help should not take.
    from ddk_ds.evaluation.benchmark_run import measure, prepare

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    wanted = [] if options.suite is None else choose_benchmarks(options.suite, options.tasks)
    left_out = left_out_code(options, wanted)
    _check_out(options.out)
    with console.status("checking models and data"):
        prepared = prepare(_request(options, [chosen for chosen in wanted if chosen not in left_out]))
    _warn_of_unsafe_code(prepared)
    results = measure(
        prepared,
        lambda line: print(line, file=sys.stderr, flush=True),
        lambda results: _save(options, prepared, left_out, results),
    )
    if prepared.loaded:
        request = prepared.request
        console.print(benchmark_table(results, request.benchmarks, left_out, request.benchmark_limit))
    if prepared.languages:
        console.print(code_table(results))
    if prepared.held_out is not None:
        console.print(domain_table(results, masked=prepared.held_out.masked))
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = command_parser(__doc__, check=_lacking)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="Hugging Face directory or hub name")
    parser.add_argument("--suite", choices=tuple(SUITES), help="benchmarks, with their numbers of examples")
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="only these benchmarks of the suite, as a,b")
    parser.add_argument("--data", type=Path, help="directory with the benchmarks' files; default: the hub")
    parser.add_argument("--shards", type=Path, help="prepared data: perplexity and bits per byte of each domain")
    parser.add_argument(
        "--documents",
        choices=("auto", "masked", "joined"),
        default="auto",
        help="masked: the documents of a sample do not see each other; joined: they do; auto, the default: masked if "
        "the shards have their borders, as in a run",
    )
    parser.add_argument("--cross-code-eval", type=Path, help="directory with CrossCodeEval's files, by language")
    parser.add_argument("--limit", type=positive, help="maximal number of documents of each task (of each subject)")
    parser.add_argument("--batch-size", type=positive, default=8, help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    parser.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="run the programs that models write for pass@1, inside bubblewrap",
    )
    parser.add_argument(
        "--unsafe-run-code",
        action="store_true",
        help="run them without a sandbox, as in a container of your own; implies --allow-code-execution",
    )
    parser.add_argument("--out", type=Path, help="JSON file for every number")
    return parse(parser, arguments)


def _lacking(options: argparse.Namespace) -> str:
    return "--tasks names benchmarks of a --suite" if options.tasks is not None and options.suite is None else ""


def left_out_code(options: argparse.Namespace, wanted: Sequence[Chosen]) -> list[Chosen]:
    """Return the benchmarks to leave out because they run generated code and that is not allowed.

    Raises ConfigError if --tasks names one of them, or if no other benchmark is left.
    """
    if options.allow_code_execution or options.unsafe_run_code:
        return []
    code = [chosen for chosen in wanted if chosen.benchmark.runs_code]
    if code and (options.tasks is not None or len(code) == len(wanted)):
        names = ", ".join(chosen.benchmark.name for chosen in code)
        raise ConfigError(
            f"--tasks: {names} would run code that the models write: add --allow-code-execution if you want that "
            "(docs/evaluation.md describes its sandbox)"
        )
    return code


def _request(options: argparse.Namespace, benchmarks: list[Chosen]) -> Request:
    from ddk_ds.evaluation.benchmark_run import Request, default_device

    return Request(
        models=options.models,
        benchmarks=benchmarks,
        data=options.data,
        shards=options.shards,
        documents=options.documents,
        cross_code_eval=options.cross_code_eval,
        limit=options.limit,
        unsafe_code=options.unsafe_run_code,
        quick=options.suite == "quick",
        batch_size=options.batch_size,
        device=options.device or default_device(),
    )


def _check_out(path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"--out {path}: is a directory; give a file in it")
    if not nearest_existing(path.parent).is_dir():
        raise ConfigError(f"--out {path}: {nearest_existing(path.parent)} is a file")


def _warn_of_unsafe_code(prepared: Prepared) -> None:
    if prepared.sandbox is not None and prepared.request.unsafe_code:
        print(
            "warning: --unsafe-run-code: the programs that models write run with all rights of this user",
            file=sys.stderr,
        )


def _save(
    options: argparse.Namespace, prepared: Prepared, left_out: Sequence[Chosen], results: Sequence[ModelResult]
) -> None:
    if options.out is None:
        return
    from ddk_ds.evaluation.benchmark_run import versions

    request = prepared.request
    content: dict[str, Any] = {
        "suite": options.suite,
        "left_out": [chosen.benchmark.name for chosen in left_out],
        "models": [as_json(result) for result in results],
        "limit": request.limit,
        "benchmark_limit": request.benchmark_limit,
        "batch_size": request.batch_size,
        "device": request.device,
        "dtype": "float32" if request.device == "cpu" else "the files'",
        "data": "hub" if request.data is None else str(request.data),
        "documents": None if prepared.held_out is None else "masked" if prepared.held_out.masked else "joined",
        "code_shut_in_by": prepared.sandbox,
        "versions": versions(),
        "commit": commit(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, json.dumps(content, indent=1) + "\n")
