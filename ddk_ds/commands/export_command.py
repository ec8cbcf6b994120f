"""Write the student of a run's checkpoint as a Hugging Face directory, also while the run continues.

    ddk export RUN [--step S] [--dtype bf16|fp32] [--out DIR]

It needs no GPU and holds one tensor at a time in memory. The trained weights are the checkpoint's float32 masters:
--dtype fp32 keeps them, bf16 rounds them as the run does for its export at the end. The directory's README.md is a
model card.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ddk_ds.command_line import command_parser, parse, reports_user_errors


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Export the student. Returns the exit code: 0, or 2 after an error that the user can fix."""
    options = _parse(arguments)
    from ddk_ds.commands.export_work import export  # takes seconds that --help should not take

    console = Console()
    with Progress(
        *(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()),
        console=console,
        transient=True,
    ) as bar:
        out, about = export(options, bar)
    console.print(f"{out}: {about}", soft_wrap=True, highlight=False)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of the run")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest complete one)")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="dtype of the weights (default: the run's train.precision)"
    )
    parser.add_argument("--out", type=Path, help="directory to write (default: RUN/exports/step-<step>-<dtype>)")
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="maximal size of a file in 10^9 bytes (default: 5)"
    )
    parser.add_argument("--student", help="the model that the run began with, if it is no longer at student.path")
    parser.add_argument("--overwrite", action="store_true", help="replace a model's directory at --out")
    return parse(parser, arguments)
