"""Write a run as one HTML page with pictures, and the pictures beside it; further runs are shown beside the first.

python tools/report.py runs/demo
python tools/report.py runs/demo runs/demo-equal --out report
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ddk_ds.errors import ConfigError, UserError
from ddk_ds.files import write_text
from ddk_ds.report.page import page, sections
from ddk_ds.report.records import read_runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an error that the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run, finished or not")
    parser.add_argument("--out", type=Path, help="directory for report.html and pictures (default: <first RUN>/report)")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.runs, options.out or options.runs[0] / "report"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write report.html and its pictures to `out`; returns the page's path. UserError where a run cannot be read."""
    runs = read_runs(run_dirs)
    parts = sections(runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for part in parts:
            for picture in part.pictures:
                write_text(out / f"{picture.name}.svg", picture.svg)
        write_text(out / "report.html", page(runs, parts))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}; name another directory") from error
    return out / "report.html"


if __name__ == "__main__":
    raise SystemExit(main())
