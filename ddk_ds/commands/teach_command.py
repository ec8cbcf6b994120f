"""Fill a cache of the teacher ahead of the runs that read it (section teacher.cache).

    ddk teach --config my.yaml [--samples 20000] [key=value ...]
    ddk teach --ranks 2 --config my.yaml

The teacher alone goes over the samples of each domain in the order in which a run of this seed draws them, and over its
held-out samples; with teacher.by_domain one teacher after the other, each over its domains. Start the same command
again after an interruption: only what is not there yet is computed. The ranks are started as by `ddk distill`, with the
same options and exit codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ddk_ds.command_line import command_parser, parse, reports_user_errors
from ddk_ds.commands.distill_command import add_launcher_options, launcher_words
from ddk_ds.commands.distill_rank import number_or_all
from ddk_ds.config import Config, load_config
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
    for of_teacher in config.teachings(_domains(config)):
        run = ["--config", options.config, *options.overrides, *of_teacher, f"--teach={samples}"]
        if code := run_launcher(launcher_command(launcher_words(launcher, options), run)):
            return code
    return 0


def _domains(config: Config) -> list[str]:
    """Return the domains to fill. Raises ConfigError if one that has a teacher of its own is not in the data."""
    if config.teacher is None or not config.teacher.by_domain:
        return []
    from ddk_ds.data.cache import open_store
    from ddk_ds.data.manifest import load_manifest
    from ddk_ds.mixture.domain_vectors import check_domains

    known = list(load_manifest(open_store(config.data)).domains)
    check_domains(config.teacher.by_domain, known, label="teacher.by_domain")
    return known if config.data.domains is None else list(config.data.domains)
