"""The checks in their order. All but `measure_collectives` are cheap: no weights are read, nothing large is sent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ddk_ds.comm import Comm
from ddk_ds.config import Config
from ddk_ds.data.cache import open_store
from ddk_ds.data.manifest import load_manifest
from ddk_ds.data.tokenizer import load_tokenizer
from ddk_ds.engine.ds_config import student_ds_config
from ddk_ds.engine.memory import ModelShape, estimate_memory, model_shape
from ddk_ds.engine.model_files import model_directory, read_model
from ddk_ds.train.inputs import Inputs, check_inputs
from ddk_ds.train.preflight import agreement, files, machine
from ddk_ds.train.preflight.agreement import Job
from ddk_ds.train.preflight.rows import Row, attempt, deadline, failed, merge

# Headers, indices and sampled bytes of large models on a busy shared file system; a first download from the hub.
FILES_S, DOWNLOAD_S = 300.0, 7200.0
_SKIPPED = "not checked: mend what failed above first"


def preflight(config: Config, comm: Comm, device: torch.device, ranks: int | None = None) -> list[Row]:
    """Everything that takes seconds: the machines, and the run's configuration, inputs, directory, disks and memory.

    The same rows on every rank. A process without a launcher stands for `ranks` (None: 1). Collective, before the run
    directory is claimed. Where a rank does not come to a check, the process ends with EXIT_FAILED.
    """
    job = Job.meet(comm, device, ranks)
    rows = _machine(job)
    with deadline("configuration and output directory", agreement.COLLECTIVE_S):
        rows.append(attempt("same configuration", lambda: agreement.same_configuration(job, config)))
        rows.append(attempt("output directory", lambda: agreement.output_directory(job, config)))
    rows.append(attempt("batch", lambda: _batch(config, job.ranks)))
    rows += _inputs(config, job)
    return _together(job, rows)


def preflight_machine(comm: Comm, device: torch.device) -> list[Row]:
    """The part that needs no configuration. Collective, the same rows on every rank."""
    job = Job.meet(comm, device, None)
    return _together(job, _machine(job))


def _together(job: Job, rows: list[Row]) -> list[Row]:
    with deadline("results of all ranks", FILES_S):
        return merge(job.comm.gather_objects(rows), job.hosts)


def _machine(job: Job) -> list[Row]:
    rows = [agreement.ranks_row(job)]
    with deadline("versions, devices and clocks", agreement.COLLECTIVE_S):
        for name, check in (
            ("versions", agreement.same_versions),
            ("devices", agreement.same_devices),
            ("clocks", agreement.clocks),
        ):
            rows.append(attempt(name, lambda check=check: check(job)))  # type: ignore[misc]
    return [
        *rows,
        attempt("shared memory", lambda: machine.shared_memory(job.local_ranks)),
        attempt("open files", machine.open_files),
        attempt("temporary files", machine.temporary_files),
        attempt("port", machine.master_port),
    ]


def _batch(config: Config, ranks: int) -> Row:
    student_ds_config(config, ranks)
    train = config.train
    found = (
        f"train.global_batch_samples {train.global_batch_samples} = {ranks} ranks x {config.micro_batches(ranks)} "
        f"micro-batches x {train.micro_batch_samples} samples"
    )
    return Row("batch", "pass", found)


def _inputs(config: Config, job: Job) -> list[Row]:
    """Models and shards by themselves; then, if these are whole on all ranks, what they are together."""
    rows = []
    paths: dict[str, Path] = {}
    for key, model in (("student", config.student), ("teacher", config.teacher)):
        if model is not None:
            with deadline(f"{key} files", DOWNLOAD_S):
                row = attempt(f"{key} files", lambda key=key, model=model: _found(key, model.path, job, paths))  # type: ignore[misc]
            rows.append(row)
    rows.append(attempt("shards", lambda: _shards(config)))
    with deadline("models and shards", FILES_S):
        whole = not any(job.comm.gather_objects(failed(rows)))
        inputs: list[Inputs] = []
        if whole:
            rows.append(attempt("tokenizers and data", lambda: _agree(config, job, inputs)))
    if not whole:
        rows.append(Row("tokenizers and data", "skip", _SKIPPED))
    rows += _of_models(config, job, paths, rows)
    return [*rows, *_of_run(config, job, inputs)]


def _found(key: str, path: str, job: Job, paths: dict[str, Path]) -> Row:
    directory = model_directory(path, f"{key}.path", job.comm)
    row = files.model_files(directory, key)
    if row.status == "pass":
        paths[key] = directory
    return row


def _shards(config: Config) -> Row:
    manifest = load_manifest(open_store(config.data))
    samples = sum(domain.train.samples for domain in manifest.domains.values())
    found = f"data.path {config.data.path}: {len(manifest.domains)} domains, {samples:,} training samples, sizes fit"
    return Row("shards", "pass", found)


def _agree(config: Config, job: Job, inputs: list[Inputs]) -> Row:
    inputs.append(check_inputs(config, job.comm))
    checked = inputs[0]
    found = f"one vocabulary of {checked.tokenizer.vocab_size:,} tokens, which the shards were made with"
    return Row("tokenizers and data", "pass", found)


def _of_models(config: Config, job: Job, paths: dict[str, Path], rows: list[Row]) -> list[Row]:
    """Precision, memory and disks: what needs models alone, whatever else failed."""
    shapes: dict[str, ModelShape] = {}
    found = []
    for key, directory in paths.items():
        model = read_model(directory, f"{key}.path")
        shapes[key] = model_shape(model)
        found.append(
            attempt(f"{key} precision", lambda key=key, model=model: files.precision(config, model, key, job.device))  # type: ignore[misc]
        )
    if "student" not in shapes or (config.teacher is not None and "teacher" not in shapes):
        return [*found, *(Row(name, "skip", _SKIPPED) for name in ("host memory", "disk for checkpoints"))]
    student, teacher = shapes["student"], shapes.get("teacher")
    checks: dict[str, Callable[[], list[Row]]] = {
        "host memory": lambda: _memory(config, job, paths["student"], student, teacher),
        "disk for checkpoints": lambda: [files.checkpoint_space(config, student)],
    }
    if config.train.nvme_path is not None:
        checks["disk for offloading"] = lambda: [files.nvme_space(config, job, student, teacher)]
    for name, check in checks.items():
        found += _attempt_all(name, check)
    return found


def _memory(
    config: Config, job: Job, directory: Path, student: ModelShape, teacher: ModelShape | None
) -> list[Row]:
    vocab_size = load_tokenizer(directory).vocab_size
    estimate = estimate_memory(config, student, teacher, vocab_size, job.ranks, job.device.type)
    rows = [machine.host_memory(estimate, job.device, job.ranks, job.local_ranks)]
    if job.device.type == "cuda":
        rows.append(machine.device_memory(estimate, job.device, job.ranks))
    return rows


def _attempt_all(name: str, check: Callable[[], list[Row]]) -> list[Row]:
    """`attempt` of a check that has several rows."""
    rows: list[Row] = []

    def first() -> Row:
        rows.extend(check())
        return rows[0]

    row = attempt(name, first)
    return rows or [row]


def _of_run(config: Config, job: Job, inputs: list[Inputs]) -> list[Row]:
    """The run's directory, which rank 0 looks at for all, and what the ranks' inputs have in common."""
    comm = job.comm
    names = ("run directory", "same files on all ranks")
    if not inputs:
        return [
            *(Row(name, "skip", _SKIPPED) for name in names),
            *_on_first(job, "newest checkpoint", lambda: files.checkpoints(config, job.ranks)),
        ]
    checked = inputs[0]
    with deadline("files' fingerprints and the run's directory", FILES_S):
        prints = {key: str(value) for key, value in checked.fingerprints.items()}
        fix = "copy models and data anew to the nodes that differ"
        rows = [attempt(names[1], lambda: agreement.same_as_first(job, names[1], prints, fix))]
        rows += _on_first(job, names[0], lambda: files.run_directory(config, checked.fingerprints))
        rows += _on_first(job, "newest checkpoint", lambda: files.checkpoints(config, job.ranks))
    if config.data.cache_dir is not None:
        name = "disk for the data cache"
        rows.append(attempt(name, lambda: files.cache_space(config, checked.manifest, checked.names)))
    assert comm.world_size == len(job.hosts), "a job of other ranks"
    return rows


def _on_first(job: Job, name: str, check: Callable[[], Row]) -> list[Row]:
    """Rank 0's row on every rank: thousands of ranks must not all look at every file of a checkpoint."""
    return [job.comm.broadcast_object(attempt(name, check) if job.comm.rank == 0 else None)]
