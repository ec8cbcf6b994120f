"""Submit a run to Slurm: as one job that requeues itself, a chain of jobs, or an array of runs.

ddk submit --config my.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 [key=value ...]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ddk_ds.command_line import CORES_PER_GPU, command_parser, parse, reports_user_errors
from ddk_ds.config import Config, load_config
from ddk_ds.config.suggestions import dashes_hint
from ddk_ds.errors import UserError
from ddk_ds.slurm.batch_script import ROOT, Container, Job, next_snapshot, render, write_snapshot

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")
_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
_OPTION = re.compile(r"(?P<key>[a-z][a-z-]*)(?:=(?P<value>.+))?")
# Options of sbatch that the script and its restarts rely on: not accepted by --sbatch-option.
_RESERVED = (
    *("account", "array", "chdir", "cpus-per-task", "dependency", "distribution", "export", "gpus-per-node"),
    *("job-name", "nodes", "no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output", "partition"),
    *("qos", "requeue", "signal"),
    *("time", "wrap"),
)
_MEMORY = {"mem", "mem-per-cpu", "mem-per-gpu"}


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Submit or show the job. Returns the exit code: 0, or 2 after an error that the user can fix."""
    options = _parse(arguments)
    config = load_config(options.config, options.overrides)
    job = make_job(options, config)
    script = render(job)
    if options.check:
        _look_at_files(config, job)
    if not options.dry_run and shutil.which("sbatch") is None:
        raise UserError("sbatch is not on PATH: submit on a login node of the cluster, or look with --dry-run")
    print(script)
    if not options.dry_run:
        write_snapshot(job.snapshot, config, script)
        _submit(job, options.chain)
    return 0


def _look_at_files(config: Config, job: Job) -> None:
    try:
        config.check_paths()
        # Imported here: neither --help nor a missing path should wait for torch and transformers.
        from ddk_ds.train.preflight import check_on_login_node

        check_on_login_node(config, job.nodes * job.ranks_per_node, own_directory=job.array is None)
    except UserError as error:
        raise UserError(f"{error} (--no-check submits it all the same, if the nodes have other files)") from error


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, dashes_hint)
    parser.add_argument("--config", required=True, help="YAML file of the run, see configs/")
    parser.add_argument("--nodes", type=int, required=True, help="number of nodes of a job")
    parser.add_argument(
        "--gpus-per-node", type=int, required=True, help="GPUs of a node, one rank each; 0 for CPU nodes"
    )
    parser.add_argument("--ranks-per-node", type=int, help="ranks of a node with --gpus-per-node 0 (default: 1)")
    parser.add_argument(
        "--time", required=True, help="time limit of a job, as sbatch takes it: [days-]hours:minutes:seconds"
    )
    parser.add_argument(
        "--signal-seconds", type=int, default=300, help="seconds before the limit at which the run saves (default: 300)"
    )
    parser.add_argument("--partition", help="as sbatch takes it")
    parser.add_argument("--account", help="as sbatch takes it")
    parser.add_argument("--qos", help="as sbatch takes it")
    parser.add_argument(
        "--cpus-per-task",
        type=int,
        help=f"cores of a rank, and its OMP_NUM_THREADS (default: {CORES_PER_GPU} with GPUs, else the cluster's own)",
    )
    parser.add_argument(
        "--sbatch-option", action="append", default=[], metavar="KEY[=VALUE]", help="another option of sbatch"
    )
    parser.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs, each starts when the previous ends")
    parser.add_argument("--array", metavar="SPEC", help="a run for each task id, named <name>-<id>: for example 0-3%%2")
    parser.add_argument("--seed-from-task", action="store_true", help="with --array: a task's seed is its id")
    parser.add_argument("--interface", help="network interface that gloo and NCCL use, for example ib0")
    parser.add_argument("--python", help="interpreter of the ranks (default: this one; in a container python3)")
    parser.add_argument("--container", metavar="IMAGE", help="image that the ranks run in")
    parser.add_argument(
        "--container-runtime", choices=("pyxis", "apptainer"), default="pyxis", help="default: %(default)s"
    )
    parser.add_argument(
        "--container-mount", action="append", default=[], metavar="DIR", help="directory that the image sees"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, show the batch script, write nothing")
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="do not look at models, shards and the run's directory"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values to replace")
    return parse(parser, arguments)  # allows overrides between options


def make_job(options: argparse.Namespace, config: Config) -> Job:
    """Return the job that the options describe. Raises UserError if it cannot run."""
    ranks = _ranks_per_node(options)
    for name in ("nodes", "chain", "signal_seconds", "cpus_per_task"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: must be at least 1")
    config.micro_batches(options.nodes * ranks)
    if options.array is not None and not _ARRAY.fullmatch(options.array):
        raise UserError(f"--array {options.array!r}: write it as 0-3, 1,5,7 or 0-15%4")
    if options.seed_from_task and options.array is None:
        raise UserError("--seed-from-task goes with --array")
    snapshot, workdir = next_snapshot(config), Path.cwd()
    return Job(
        name=config.name,
        snapshot=snapshot,
        workdir=workdir,
        nodes=options.nodes,
        ranks_per_node=ranks,
        options=_sbatch_options(options),
        python=options.python or ("python3" if options.container else sys.executable),
        chained=options.chain > 1,
        array=options.array,
        seed_from_task=options.seed_from_task,
        # Slurm's own default is one.
        cpus_per_task=options.cpus_per_task or (CORES_PER_GPU if options.gpus_per_node else None),
        interface=options.interface,
        container=_container(options, workdir, config),
    )


def time_limit_s(text: str) -> int:
    """Convert a time limit in sbatch's notation to seconds. Raises UserError if it is not in that notation."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise UserError(f"--time {text!r}: write it as minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    fields = [int(part) for part in match["fields"].split(":")]
    if match["days"] is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*fields, 0, 0)[:3]
    else:  # minutes[:seconds], hours:minutes:seconds
        hours, minutes, seconds = fields if len(fields) == 3 else (0, *fields, 0)[:3]
    return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _ranks_per_node(options: argparse.Namespace) -> int:
    if options.gpus_per_node < 0:
        raise UserError(f"--gpus-per-node is {options.gpus_per_node}: must be at least 0")
    if options.gpus_per_node and options.ranks_per_node not in (None, options.gpus_per_node):
        raise UserError("--ranks-per-node goes with --gpus-per-node 0: with GPUs each has one rank")
    ranks: int = options.gpus_per_node or (1 if options.ranks_per_node is None else options.ranks_per_node)
    if ranks < 1:
        raise UserError(f"--ranks-per-node is {ranks}: must be at least 1")
    return ranks


def _sbatch_options(options: argparse.Namespace) -> dict[str, str | None]:
    limit_s = time_limit_s(options.time)
    if options.signal_seconds >= limit_s:
        raise UserError(f"--signal-seconds {options.signal_seconds} is not less than --time {options.time}")
    result: dict[str, str | None] = {"time": options.time, "signal": f"B:USR1@{options.signal_seconds}"}
    if options.gpus_per_node:
        result["gpus-per-node"] = str(options.gpus_per_node)
    for key in ("partition", "account", "qos"):
        if (value := getattr(options, key)) is not None:
            result[key] = value
    for text in options.sbatch_option:
        match = _OPTION.fullmatch(text)
        if match is None:
            raise UserError(f"--sbatch-option {text!r}: write it as one of sbatch's long options, for example mem=64G")
        if match["key"] in _RESERVED:
            raise UserError(f"--sbatch-option {text!r}: {match['key']} is set by this command's own options")
        result[match["key"]] = match["value"]
    if options.gpus_per_node and not result.keys() & _MEMORY:
        result["mem"] = "0"  # all of a node; the site's default can be a few GB for each core
    return result


def _container(options: argparse.Namespace, workdir: Path, config: Config) -> Container | None:
    if options.container is None:
        return None
    requested = [Path(path).absolute() for path in options.container_mount]
    mounts = dict.fromkeys(str(path) for path in (ROOT, workdir, Path(config.output_dir).absolute(), *requested))
    for path in mounts:
        if "," in path or ":" in path:
            raise UserError(f"--container-mount {path}: a path with a comma or a colon cannot be mounted")
    return Container(options.container, options.container_runtime, tuple(mounts), options.gpus_per_node > 0)


def _submit(job: Job, chain: int) -> None:
    """Submit the snapshot's script `chain` times, each job to start after the previous."""
    submitted: list[str] = []
    for _ in range(chain):
        dependency = [f"--dependency=afterany:{submitted[-1]}"] if submitted else []
        command = ["sbatch", "--parsable", *dependency, str(job.snapshot / "job.sbatch")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            if not submitted:
                shutil.rmtree(job.snapshot)
            earlier = f"; already submitted: {' '.join(submitted)}" if submitted else ""
            raise UserError(f"sbatch: {done.stderr.strip()}{earlier}")
        submitted.append(done.stdout.strip().split(";")[0])  # number[;cluster]
    print(f"submitted: {' '.join(submitted)}; logs in {job.snapshot}")
