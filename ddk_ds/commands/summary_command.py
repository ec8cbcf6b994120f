"""Show the results of finished runs, and several runs side by side.

ddk summary runs/demo runs/demo-equal
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ddk_ds.command_line import command_parser, parse, reports_user_errors
from ddk_ds.run_files import read_summary


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; return 0, or 2 for an error that the user can mend."""
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a finished run")
    options = parse(parser, arguments)
    from ddk_ds.train.run_end import summary_table  # takes seconds that --help should not take

    console = Console()
    summaries = [read_summary(run) for run in options.runs]
    for summary in summaries:
        console.print(summary_table(summary))
    if len(summaries) > 1:
        console.print(comparison_table(summaries))
    return 0


def comparison_table(summaries: list[dict[str, Any]]) -> Table:
    """Make the table of each run's perplexity after training and share of the tokens, by domain."""
    table = Table(title="student perplexity after (share of tokens)", title_justify="left")
    table.add_column("domain")
    for summary in summaries:
        table.add_column(summary["run"], justify="right")
    by_run = [{domain["name"]: domain for domain in summary["domains"]} for summary in summaries]
    for name in by_run[0]:
        cells = [
            f"{d[name]['student_ppl_after']:.2f} ({d[name]['token_share']:.1%})" if name in d else "-" for d in by_run
        ]
        table.add_row(name, *cells)
    means = [summary["mean_ratio_after"] for summary in summaries]
    table.add_section()
    table.add_row("mean ratio to the teacher", *("-" if mean is None else f"{mean:.3f}" for mean in means))
    return table
