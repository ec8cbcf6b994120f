"""Run all stages of a method, each a run of its own.

    ddk stages --config my.yaml --method doremi --ranks 2 [key=value ...]

Start the same command again to continue: finished stages are skipped, an unfinished one continues from its newest
checkpoint. The last stage has the run's own name, an earlier one that name and its suffix. A stage's output goes to
<output_dir>/<name>.log.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ddk_ds.command_line import command_parser, parse, positive, reports_user_errors
from ddk_ds.comparison.method_stages import STAGES, Job, RunInterrupted, StageFailed, run_job
from ddk_ds.config import load_config
from ddk_ds.config.suggestions import dashes_hint
from ddk_ds.exit_codes import EXIT_INTERRUPTED


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if done, 1 if a stage failed, 75 if interrupted, or the code of an error."""
    parser = command_parser(__doc__, dashes_hint)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--method", required=True, choices=tuple(STAGES), help="method of all its stages")
    parser.add_argument("--ranks", type=positive, help="ranks of each stage (default: one for each accelerator)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values to replace")
    options = parse(parser, arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    first = STAGES[options.method][0]
    config = load_config(options.config, [*options.overrides, *first.overrides])
    job = Job(options.config, options.method, config.name, Path(config.output_dir), tuple(options.overrides))
    job.check()
    try:
        for line in run_job(job, options.ranks):
            print(line, flush=True)
    except (KeyboardInterrupt, RunInterrupted) as interrupted:
        print(f"interrupted: start the same command again to continue. {interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
