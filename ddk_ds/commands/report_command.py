"""Write a run as one HTML page with pictures, and the pictures as files; further runs are compared with the first.

ddk report runs/demo
ddk report runs/demo runs/demo-equal --out report
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ddk_ds.command_line import command_parser, parse, reports_user_errors
from ddk_ds.report.page import write_page


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and print its path; return 0, or 2 for an error that the user can mend."""
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run, finished or not")
    parser.add_argument("--out", type=Path, help="directory for report.html and pictures (default: <first RUN>/report)")
    options = parse(parser, arguments)
    print(write_page(options.runs, options.out or options.runs[0] / "report"))
    return 0
