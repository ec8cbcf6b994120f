"""Check a run and its machines before it starts, and say what to mend.

ddk preflight --config configs/demo.yaml [key=value ...]
deepspeed launch/preflight.py --config configs/demo.yaml [key=value ...]

The first command checks one machine, for a run of `--ranks` ranks, or of `--nodes` times
`--gpus-per-node`. The second, or srun, checks all ranks together.
"""

from __future__ import annotations

import argparse
import json
import os
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ddk_ds.command_line import command_parser, parse, positive
from ddk_ds.config import Config, Limits, load_config
from ddk_ds.config.suggestions import dashes_hint
from ddk_ds.errors import UserError
from ddk_ds.exit_codes import EXIT_USER_ERROR
from ddk_ds.lifeline import follow_launcher

if TYPE_CHECKING:
    from ddk_ds.comm import Comm
    from ddk_ds.train.preflight import Row

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 if every check passed or warned, 2 if one failed."""
    if "RANK" in os.environ:
        follow_launcher()
    options = _parse(arguments)
    from ddk_ds.comm import destroy, in_group, leave  # imports torch, for which --help should not wait

    try:
        code = _run(options)
        destroy()
    except Exception:
        if in_group():
            leave(1, traceback.print_exc)
        raise
    return code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, dashes_hint, _unplannable)
    parser.add_argument("--config", required=True, help="YAML file of the run, see configs/")
    parser.add_argument("--ranks", type=positive, help="without a launcher: number of ranks that the run will have")
    parser.add_argument("--nodes", type=positive, help="without a launcher: number of nodes that they are on")
    parser.add_argument(
        "--gpus-per-node",
        type=positive,
        help="without a launcher: GPUs of a node, one rank each (--nodes 1 unless given)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--no-collectives", action="store_true", help="do not measure collectives, which takes longest")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace configuration values")
    options = parse(parser, arguments)
    options.planned = _planned(options)
    return options


def _planned(options: argparse.Namespace) -> tuple[int, int | None, bool] | None:
    ranks, nodes, each = options.ranks, options.nodes, options.gpus_per_node
    if each is not None:
        nodes = nodes or (1 if ranks is None else max(1, ranks // each))
        ranks = nodes * each
    return None if ranks is None else (ranks, nodes, each is not None)


def _unplannable(options: argparse.Namespace) -> str:
    given, each = options.ranks, options.gpus_per_node
    if given is options.nodes is each is None:
        return ""
    if "RANK" in os.environ:
        return "--ranks, --nodes and --gpus-per-node go without a launcher, which knows them itself"
    planned = _planned(options)
    if planned is None:
        return f"--nodes {options.nodes}: give --gpus-per-node or --ranks too"
    ranks, nodes, _ = planned
    if given not in (None, ranks):
        return f"--ranks {given} is not {nodes} nodes x --gpus-per-node {each}"
    if nodes is not None and ranks % nodes:
        return f"--ranks {ranks} is not a multiple of --nodes {nodes}"
    return ""


def _run(options: argparse.Namespace) -> int:
    import torch

    from ddk_ds.comm import SingleProcess, watch_ranks
    from ddk_ds.engine.runtime import start_runtime
    from ddk_ds.train.preflight import (
        PlannedRanks,
        failed,
        measure_collectives,
        preflight,
        preflight_machine,
    )

    runtime = start_runtime() if "RANK" in os.environ else None
    comm: Comm = SingleProcess() if runtime is None else runtime.comm
    if runtime is not None:
        watch_ranks(Limits().silence_s)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if runtime is None else runtime.device
    config, error = _load(options)
    # A rank that has no configuration must not leave the others waiting for it in the checks that need one.
    errors = [found for found in comm.gather_objects(error) if found is not None]
    if errors:
        rows = [errors[0], *preflight_machine(comm, device)]
    else:
        assert config is not None, "a configuration without an error"
        rows = preflight(config, comm, device, options.planned and PlannedRanks(*options.planned))
    if not options.no_collectives:
        rows += measure_collectives(comm, device)
    if comm.rank == 0:
        _show(rows)
        if options.json is not None:
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return EXIT_USER_ERROR if failed(rows) else 0


def _load(options: argparse.Namespace) -> tuple[Config | None, Row | None]:
    from ddk_ds.train.preflight import Row

    try:
        return load_config(options.config, options.overrides), None
    except UserError as error:
        return None, Row("configuration", "fail", str(error))


def _show(rows: Sequence[Row]) -> None:
    table = Table("check", "result", "found", title="preflight", title_justify="left")
    for row in rows:
        found = escape(row.found) + (f"\n[bold]fix:[/bold] {escape(row.fix)}" if row.fix else "")
        table.add_row(row.name, f"[{_STYLES[row.status]}]{row.status}[/]", found)
    console = Console()
    console.print(table)
    counts = {status: sum(row.status == status for row in rows) for status in _STYLES}
    console.print(f"{counts['pass']} passed, {counts['warn']} warn, {counts['fail']} failed")
