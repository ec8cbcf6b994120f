"""Show the results of finished runs, and several runs side by side.

python tools/summary.py runs/demo runs/demo-equal
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ddk_ds.errors import UserError
from ddk_ds.run_files import read_summary
from ddk_ds.train.run_end import summary_table


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a finished run")
    options = parser.parse_args()
    console = Console()
    try:
        summaries = [read_summary(run) for run in options.runs]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for summary in summaries:
        console.print(summary_table(summary))
    if len(summaries) > 1:
        console.print(comparison_table(summaries))
    return 0


def comparison_table(summaries: list[dict[str, Any]]) -> Table:
    """By domain: each run's perplexity after training and its share of the tokens."""
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


if __name__ == "__main__":
    sys.exit(main())
