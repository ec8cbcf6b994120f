"""Show the results of a finished run, or of several side by side.

ddk summary runs/demo runs/demo-equal
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
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
    console.print(comparison_table(summaries) if len(summaries) > 1 else summary_table(summaries[0]))
    return 0


def comparison_table(summaries: list[dict[str, Any]]) -> Table:
    """Make the table of the student's perplexity after each run, by domain, with the run's share of tokens.

    The last lines are ratios to the teacher. "before" is the first run's starting student. The lowest number is bold.
    """
    title = "student perplexity after each run, and the domain's share of its tokens"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("domain", no_wrap=True)
    for heading in ("teacher", "before", *(summary["run"] for summary in summaries)):
        table.add_column(heading, justify="right")
    by_run = [{domain["name"]: domain for domain in summary["domains"]} for summary in summaries]
    for name, first in by_run[0].items():
        found = [domains.get(name) for domains in by_run]
        after = [domain and domain["student_ppl_after"] for domain in found]
        shares = [f" {domain['token_share']:4.0%}" if domain else "" for domain in found]
        table.add_row(name, _number(first["teacher_ppl"]), _number(first["student_ppl_before"]), *_cells(after, shares))
    table.add_section()
    for label, score in (("mean ratio", fmean), ("largest ratio", max)):
        after = [_ratio(summary, "ratio_after", score) for summary in summaries]
        before = _ratio(summaries[0], "ratio_before", score)
        table.add_row(label, "", _number(before, 3), *_cells(after, ["     "] * len(after), 3))
    return table


def _ratio(summary: dict[str, Any], key: str, score: Callable[[list[float]], float]) -> float | None:
    """Return the mean or the largest of a run's ratios to the teacher, or None if it had no teacher."""
    ratios = [domain[key] for domain in summary["domains"]]
    return None if None in ratios else score(ratios)


def _cells(values: Sequence[float | None], endings: Sequence[str], digits: int = 2) -> list[str]:
    """Return the numbers as text with their endings; the lowest is bold."""
    lowest = min((value for value in values if value is not None), default=None)
    texts = [_number(value, digits) for value in values]
    texts = [f"[bold]{text}[/]" if value == lowest else text for value, text in zip(values, texts, strict=True)]
    return [text + ending for text, ending in zip(texts, endings, strict=True)]


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
