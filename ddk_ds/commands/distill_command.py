"""Distil (or continue pre-training) one student by one configuration, which is checked before anything is started.

    ddk distill --config my.yaml [key=value ...]
    ddk distill --ranks 2 --config my.yaml
    ddk distill --hostfile hosts --config my.yaml

DeepSpeed's launcher starts a rank on each GPU; without a GPU, give --ranks. Start the same command again to continue an
interrupted run. Exit codes: 0 done; 2 an error that you can mend; 3 numbers went wrong; 69 an error that
time may mend; 75 interrupted by a signal, and saved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ddk_ds.command_line import command_parser, parse, positive, reports_user_errors
from ddk_ds.commands import distill_rank
from ddk_ds.config import load_config
from ddk_ds.config.suggestions import dashes_hint
from ddk_ds.launcher import launcher_command, run_launcher
from ddk_ds.run_files import is_finished

# Options of DeepSpeed's launcher that go on to it unchanged; in _FLAGS those without a value.
_VALUES = {
    "--hostfile": "file with a line `host slots=N` for each host",
    "--include": "hosts and GPUs to use, for example host1@host2:0,2",
    "--exclude": "hosts and GPUs not to use",
    "--num_nodes": "the first so many hosts of the hostfile",
    "--master_addr": "address of the first rank (default: the first host's)",
    "--master_port": "port of the first rank (default: a free one; 29500 with a hostfile)",
    "--node_rank": "number of this node, with --no_ssh",
    "--launcher": "pdsh (default), openmpi, mpich, impi, mvapich or slurm",
    "--launcher_args": "arguments for it, as one word",
    "--ssh_port": "port of ssh",
    "--bind_core_list": "cores to bind ranks to, for example 0-15",
    "--enable_each_rank_log": "directory for a log of each rank",
    "--venv_script": "script that activates the environment on each host",
    "--log_level": "messages of the launcher: debug, info, warning, error (default) or critical",
}
_FLAGS = {
    "--no_ssh": "start on each node by hand",
    "--no_ssh_check": "do not try ssh first",
    "--force_multi": "start by --launcher also on one host",
    "--bind_cores_to_rank": "bind each rank to cores of its own",
    "--save_pid": "write the launcher's process id to /tmp",
}


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Check the configuration, run the launcher, and return the run's exit code."""
    parser = command_parser(__doc__, dashes_hint)
    distill_rank.add_options(parser)
    launcher = add_launcher_options(parser)
    options = parse(parser, arguments)
    run = ["--config", options.config, *options.overrides]
    if options.print_config or options.dry_run:
        ranks = [] if options.ranks is None else [f"--ranks={options.ranks}"]
        return distill_rank.main([*run, *ranks, "--print-config" if options.print_config else "--dry-run"])
    config = load_config(options.config, options.overrides)
    config.check_paths()
    if options.ranks is not None and options.hostfile is None:
        config.micro_batches(options.ranks)
    given = launcher_words(launcher, options)
    code = run_launcher(launcher_command(given, [*run, *([] if options.preflight else ["--no-preflight"])]))
    if code == 0 and not is_finished(config.run_dir):  # DeepSpeed's launcher returns 0 if a part of it was killed
        print(f"error: a launcher was killed: {config.run_dir} is not finished; start it again", file=sys.stderr)
        return 1
    return code


def add_launcher_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Add the launcher's options to the parser, and return them."""
    group = parser.add_argument_group("DeepSpeed's launcher")
    names = ("--ranks", "--num_accelerators", "--num_gpus")
    actions: list[argparse.Action] = [
        group.add_argument(
            *names, dest="ranks", type=positive, metavar="N", help="ranks of each host (default: one for each GPU)"
        )
    ]
    actions += [group.add_argument(name, help=text, metavar="VALUE") for name, text in _VALUES.items()]
    return actions + [group.add_argument(name, help=text, action="store_true") for name, text in _FLAGS.items()]


def launcher_words(launcher: Sequence[argparse.Action], options: argparse.Namespace) -> list[str]:
    """Return the words that give the launcher's options the values that the user gave them."""
    return [word for action in launcher for word in _words(action, options)]


def _words(action: argparse.Action, options: argparse.Namespace) -> list[str]:
    """Return the words that give a launcher's option its value; none if it was not given."""
    value, name = getattr(options, action.dest), action.option_strings[-1]
    if value is None or value is False:
        return []
    return [name] if value is True else [f"{name}={value}"]
