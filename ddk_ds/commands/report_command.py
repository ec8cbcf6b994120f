"""Write a run as one HTML page with pictures, and the pictures as files; further runs are compared with the first.

ddk report runs/demo
ddk report runs/demo runs/demo-equal --out report
ddk report runs/demo --watch
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ddk_ds.command_line import command_parser, parse, positive, reports_user_errors


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and print its path, or serve it; return 0, or 2 for an error that the user can mend."""
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run, finished or not")
    parser.add_argument("--out", type=Path, help="directory for report.html and pictures (default: <first RUN>/report)")
    parser.add_argument(
        "--watch", action="store_true", help="write nothing: serve the page on this machine, and follow the run"
    )
    parser.add_argument("--port", type=int, default=8765, help="port of --watch on 127.0.0.1; 0: any (default: 8765)")
    parser.add_argument("--every", type=positive, default=5, help="seconds between two looks of --watch (default: 5)")
    options = parse(parser, arguments)
    # Only here: --help needs neither Bokeh nor the configuration's schema.
    if options.watch:
        from ddk_ds.report.watch import watch

        watch(options.runs, options.port, options.every)
    else:
        from ddk_ds.report.page import write_page

        print(write_page(options.runs, options.out or options.runs[0] / "report"))
    return 0
