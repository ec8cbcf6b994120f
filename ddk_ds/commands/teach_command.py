"""Fill a cache of the teacher ahead of the runs that read it (section teacher.cache).

    ddk teach --config my.yaml [--samples 20000] [key=value ...]
    ddk teach --ranks 2 --config my.yaml

The teacher alone goes over the samples of each domain in the order in which a run of this seed draws them, and over its
held-out samples. Start the same command again after an interruption: only what is not there yet is computed. The ranks
are started as by `ddk distill`, with the same options and exit codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ddk_ds.command_line import command_parser, parse, reports_user_errors
from ddk_ds.commands.distill_command import add_launcher_options, launcher_words
from ddk_ds.commands.distill_rank import number_or_all
from ddk_ds.config import load_config
from ddk_ds.config.suggestions import dashes_hint
from ddk_ds.launcher import launcher_command, run_launcher


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Check the configuration, run the launcher, and return the exit code."""
    parser = command_parser(__doc__, dashes_hint)
    parser.add_argument("--config", required=True, help="YAML file of a run, see configs/")
    parser.add_argument(
        "--samples", type=number_or_all, default=math.inf, help="samples of each domain (default: all)", metavar="N"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace configuration values")
    launcher = add_launcher_options(parser)
    options = parse(parser, arguments)
    config = load_config(options.config, options.overrides)
    config.check_teaching()
    config.check_paths()
    samples = "all" if options.samples == math.inf else str(options.samples)
    run = ["--config", options.config, *options.overrides, f"--teach={samples}"]
    return run_launcher(launcher_command(launcher_words(launcher, options), run))
