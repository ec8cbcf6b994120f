"""Distil (or continue pre-training) one student by one configuration.

deepspeed launch/distill.py --config configs/demo.yaml [key=value ...]
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ddk_ds.command_line import command_parser, mendable, parse, positive
from ddk_ds.config import Config, load_config, to_yaml
from ddk_ds.config.suggestions import dashes_hint
from ddk_ds.data.readers import Readers
from ddk_ds.errors import UserError
from ddk_ds.exit_codes import EXIT_ENDED_AT_ONCE, EXIT_INTERRUPTED, EXIT_WRONG_NUMBERS
from ddk_ds.lifeline import follow_launcher
from ddk_ds.redact import redact
from ddk_ds.remote_hosts import decoded
from ddk_ds.run_files import is_finished, read_summary
from ddk_ds.train.rank_environment import set_rank_environment
from ddk_ds.train.watchdog import Watchdog

if TYPE_CHECKING:
    from ddk_ds.comm import Comm
    from ddk_ds.engine.runtime import Runtime
    from ddk_ds.train.inputs import Inputs
    from ddk_ds.train.preflight import Row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    ddk_ds/exit_codes.py has them all.
    """
    if "RANK" in os.environ:
        follow_launcher()
    parser = command_parser(__doc__, dashes_hint)
    add_options(parser)
    parser.add_argument(
        "--ranks",
        type=positive,
        help="with --print-config or --dry-run, without a launcher: check the batch for this number of ranks",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    # Of `ddk teach`: fill the cache of the teacher with so many samples of each domain ("all"), and train nothing.
    parser.add_argument("--teach", type=number_or_all, help=argparse.SUPPRESS)
    options = parse(parser, decoded(sys.argv[1:] if arguments is None else arguments))
    try:
        config = load_config(options.config, options.overrides)
        if options.ranks is not None:
            if "RANK" in os.environ:
                raise UserError(f"--ranks {options.ranks}: under a launcher the number of ranks is the launcher's")
            config.micro_batches(options.ranks)
        if options.print_config:
            _console().print(to_yaml(config), end="", highlight=False, soft_wrap=True)
            return 0
        if os.environ.get("RANK", "0") == "0":  # the other ranks check theirs together, when they have met
            config.check_paths()
        if "RANK" not in os.environ and not options.dry_run:
            raise UserError("start it with a launcher: ddk distill, or deepspeed launch/distill.py")
        with closing(Readers(0 if options.dry_run else config.data.num_workers)) as readers:
            if options.teach is not None:
                code = _teach(config, readers, options.teach)
            else:
                code = _run(config, readers, options.ranks or 1, dry_run=options.dry_run, preflight=options.preflight)
        if (comm := sys.modules.get("ddk_ds.comm")) is not None:  # it imports torch; without it nothing was begun
            comm.destroy()
        return code
    except KeyboardInterrupt:
        text = "ended at once: start the same command again to continue from the newest checkpoint"
        return _leave(EXIT_ENDED_AT_ONCE, text)
    except Exception as error:
        unexpected = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}: {traceback.format_exc()}", 1
        text, code = mendable(error) or unexpected
        return _leave(code, text)


def _leave(code: int, text: str) -> int:
    """Print `text` and return the exit code, or end all ranks with it if they have met; then it is printed once.

    Before they meet, each machine prints its error, and each rank an unexpected one: the others may not have it.
    """

    def say() -> None:
        console = Console(stderr=True)
        console.print(redact(text), style="bold red", highlight=False, soft_wrap=True, markup=False)

    comm = sys.modules.get("ddk_ds.comm")
    if comm is not None and comm.in_group():
        comm.leave(code, say)
    if code == 1 or os.environ.get("LOCAL_RANK", "0") == "0":
        say()
    return code


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run, which a rank and `ddk distill` share."""
    parser.add_argument("--config", required=True, help="YAML file of the run, see configs/")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--dry-run", action="store_true", help="check everything that needs no training, and exit")
    parser.add_argument(
        "--no-preflight", dest="preflight", action="store_false", help="start without checking the machines"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace configuration values")


def _run(config: Config, readers: Readers, ranks: int, *, dry_run: bool, preflight: bool) -> int:
    watchdog, runtime, comm, inputs, identity = _meet(config, readers)
    from ddk_ds.comm import call_together
    from ddk_ds.train.run_dir import check_run_dir, claim_run_dir

    call_together(comm, lambda: check_run_dir(config, identity))
    if dry_run or runtime is None or watchdog is None:
        _report(config, inputs, ranks if runtime is None else comm.world_size)
        return 0
    if comm.broadcast_object(call_together(comm, lambda: _is_finished(config) if comm.rank == 0 else False)):
        _console().print(f"{config.run_dir} is finished: see {config.run_dir / 'summary.json'}", soft_wrap=True)
        return 0
    if preflight:
        _check_machines(config, inputs, runtime)
    call_together(comm, lambda: claim_run_dir(config, identity) if comm.rank == 0 else None)
    watchdog.write_to(config.run_dir, comm.rank)
    from ddk_ds.train.guard import NumbersGoneWrong
    from ddk_ds.train.interruption import Interrupted
    from ddk_ds.train.loop import train
    from ddk_ds.train.setup import prepare_run

    run = prepare_run(config, inputs, identity, runtime, watchdog, readers)
    with run.interruption.listening():  # until here there is nothing to save: a signal ends the process at once
        try:
            train(run)
        except Interrupted:
            runtime.comm.barrier()  # the launcher ends every rank when one has gone; rank 0 closes its monitors last
            return EXIT_INTERRUPTED
        except NumbersGoneWrong:
            return EXIT_WRONG_NUMBERS
    return 0


def _meet(config: Config, readers: Readers) -> tuple[Watchdog | None, Runtime | None, Comm, Inputs, dict[str, Any]]:
    """Let the ranks meet, and check what the run reads; return that, and the run's identity. Collective.

    Without a launcher there is neither a watchdog nor a runtime.
    """
    watchdog = Watchdog(config.limits) if "RANK" in os.environ else None
    if watchdog is not None:
        set_rank_environment()
    # Imported here: torch and DeepSpeed take seconds, for which a misspelt key should not have to wait.
    from ddk_ds.comm import SingleProcess, call_together, watch_ranks
    from ddk_ds.engine.runtime import start_runtime
    from ddk_ds.train.inputs import check_inputs
    from ddk_ds.train.run_dir import run_identity

    readers.start()  # before there is anything of NCCL's or CUDA's
    runtime = None if watchdog is None else start_runtime(config.limits)
    comm: Comm = SingleProcess() if runtime is None else runtime.comm
    if runtime is not None:
        watch_ranks(config.limits.silence_s)
    inputs = check_inputs(config, comm)
    for note in inputs.notes:
        _console().print(note, soft_wrap=True, highlight=False, markup=False)
    identity = call_together(comm, lambda: run_identity(config, inputs.fingerprints))
    return watchdog, runtime, comm, inputs, identity


def _teach(config: Config, readers: Readers, samples: float) -> int:
    """Fill the cache of the teacher with that many samples of each domain, and return the exit code. Collective."""
    config.check_teaching()
    watchdog, runtime, comm, inputs, identity = _meet(config, readers)
    assert watchdog is not None and runtime is not None, "ddk teach has a launcher"
    from ddk_ds.train.interruption import Interrupted
    from ddk_ds.train.teach import fill_cache

    try:
        done = fill_cache(config, inputs, identity, runtime, watchdog, readers, samples)
    except Interrupted as interrupted:
        comm.barrier()
        _console().print(f"interrupted by {interrupted}: start the same command again to continue", soft_wrap=True)
        return EXIT_INTERRUPTED
    _console().print(done, soft_wrap=True, highlight=False)
    return 0


def number_or_all(text: str) -> float:
    """Return the positive number that `text` says, infinity for "all". Raises ArgumentTypeError."""
    return math.inf if text == "all" else positive(text)


def _is_finished(config: Config) -> bool:
    """Return True if the run has its summary. Raises CheckpointError if that is damaged."""
    return is_finished(config.run_dir) and bool(read_summary(config.run_dir))


def _check_machines(config: Config, inputs: Inputs, runtime: Runtime) -> None:
    """Make the cheap checks of `ddk preflight`, and print warnings. Raise UserError on every rank if one fails."""
    from ddk_ds.train.preflight import preflight

    rows = preflight(config, runtime.comm, runtime.device, inputs=inputs)
    _warn(rows)
    failures = [f"{row.name}: {row.found}; {row.fix}" for row in rows if row.status == "fail"]
    if failures:
        raise UserError("; ".join(failures) + ". every check is shown by ddk preflight; --no-preflight leaves them out")


def _warn(rows: Sequence[Row]) -> None:
    for row in rows:
        if row.status == "warn":
            _console().print(redact(f"warning: {row.name}: {row.found}; {row.fix}"), soft_wrap=True, markup=False)


def _report(config: Config, inputs: Inputs, world_size: int) -> None:
    from ddk_ds.train.preflight import domain_samples, same_tokenizers

    train = config.train
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    table = Table("domain", "train samples", "validation samples", title="every check passed", title_justify="left")
    for name in inputs.names:
        domain = inputs.manifest.domains[name]
        table.add_row(name, f"{domain.train.samples:,}", f"{domain.validation.samples:,}")
    _console().print(table)
    _console().print(
        f"{ranks} x {config.micro_batches(world_size)} micro-batches x {train.micro_batch_samples} samples "
        f"x {config.data.sequence_length} tokens = {train.global_batch_samples * config.data.sequence_length:,} tokens "
        f"a step; student {inputs.student.directory}; teacher {inputs.teacher and inputs.teacher.directory}; "
        f"vocabulary {inputs.vocabulary.size:,}; run directory {config.run_dir}. The number of ranks is the "
        "launcher's; without one that of --ranks, or 1",
        soft_wrap=True,
    )
    _warn([same_tokenizers(inputs), domain_samples(config, inputs)])


def _console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, quiet=os.environ.get("RANK", "0") != "0")


if __name__ == "__main__":
    sys.exit(main())
