"""Show the state of a run on one screen, from any machine that can read its directory.

ddk status runs/demo
ddk status runs/demo --watch 5
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from ddk_ds.command_line import command_parser, parse, reports_user_errors
from ddk_ds.errors import DataError, UserError
from ddk_ds.files import nearest_existing
from ddk_ds.report.screen import OTHER_LINES, Surroundings, screen
from ddk_ds.train.checkpoint.checkpoint_files import MANIFEST, damaged_since, newest_checkpoint


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Show the screen; return 0, or 2 where the run has not begun or cannot be read."""
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run, finished or not")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="show it again and again, until Ctrl-C")
    options = parse(parser, arguments)
    console = Console(highlight=False)
    if options.watch is not None:
        return watch(options.run, max(0.2, options.watch), console)
    try:
        console.print(current_screen(options.run, console))
    except OSError as error:
        raise DataError(f"{options.run}: cannot be read: {error}") from error
    return 0


def current_screen(run_dir: Path, console: Console) -> RenderableType:
    """Return the screen as it is now. Raises UserError where the run has not begun or cannot be read."""
    newest = newest_checkpoint(run_dir)
    checkpoint, step = None, -1
    if newest is not None:
        directory, manifest = newest
        step = manifest.step
        checkpoint = step, (directory / MANIFEST).stat().st_mtime, manifest.num_bytes
    free = shutil.disk_usage(nearest_existing(run_dir)).free
    # A file, or a screen that is printed once, can have any height.
    rows = max(3, console.height - OTHER_LINES) if console.is_terminal else None
    around = Surroundings(time.time(), checkpoint, damaged_since(run_dir, step), free)
    return screen(run_dir, around, rows)


def watch(run_dir: Path, every_s: float, console: Console) -> int:
    """Show the screen again every `every_s` seconds until Ctrl-C; wait for a run that has not begun."""

    def now() -> RenderableType:
        try:
            return current_screen(run_dir, console)
        except (UserError, OSError) as error:  # a file can vanish or be half written while it is read
            return Text(str(error))

    try:
        with Live(now(), console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                time.sleep(every_s)
                live.update(now(), refresh=True)
    except KeyboardInterrupt:
        return 0
