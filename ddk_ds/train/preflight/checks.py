"""All checks of a preflight in their order. They are cheap: no weights are read and nothing large is sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ddk_ds.comm import Comm, SingleProcess, call_together
from ddk_ds.config import Config
from ddk_ds.data.cache import open_store
from ddk_ds.data.manifest import load_manifest
from ddk_ds.engine.ds_config import student_ds_config
from ddk_ds.engine.eight_bits import skipped_layers
from ddk_ds.engine.memory_estimate import MEMORY_MARGIN, estimate_memory, fits_into, settled_place
from ddk_ds.engine.model_files import ModelShape, model_directory, model_shape, read_model
from ddk_ds.train.inputs import Inputs, check_inputs
from ddk_ds.train.preflight import agreement, machine, path_checks, teacher_rows
from ddk_ds.train.preflight.agreement import Job, PlannedRanks
from ddk_ds.train.preflight.rows import Row, attempt, deadline, failed, merge
from ddk_ds.train.preflight.sample_counts import domain_samples, same_tokenizers

# Headers, indices and sampled bytes of large models on a busy shared file system; a first download from the hub.
FILES_S, DOWNLOAD_S = 300.0, 7200.0


def preflight(
    config: Config,
    comm: Comm,
    device: torch.device,
    planned: PlannedRanks | None = None,
    inputs: Inputs | None = None,
) -> list[Row]:
    """Check the machines and the run's configuration, inputs, directory, disks and memory; return the rows.

    Collective: the rows are the same on every rank. It takes seconds, and must come before `claim_run_dir`. A check
    that needs a faulty file is left out. If a rank does not come to a check, the process ends with EXIT_TEMPORARY.

    Args:
        planned: the ranks that a process without a launcher stands for; None for itself alone.
        inputs: inputs that were checked before and are not read again; None: they are read and checked here.
    """
    job = Job.meet(comm, device, planned)
    rows = _machine(job)
    with deadline("configuration and output directory", agreement.COLLECTIVE_S):
        rows.append(attempt("same configuration", agreement.same_configuration, job, config))
        rows.append(attempt("output directory", agreement.output_directory, job, config))
    rows.append(attempt("batch", _batch, config, job.ranks))
    rows += _inputs(config, job, inputs)
    return _merge_ranks(job, rows)


def preflight_machine(comm: Comm, device: torch.device) -> list[Row]:
    """Check the machines alone, without a configuration; return the rows. Collective: the same on every rank."""
    job = Job.meet(comm, device, None)
    return _merge_ranks(job, _machine(job))


def _merge_ranks(job: Job, rows: list[Row]) -> list[Row]:
    with deadline("results of all ranks", FILES_S):
        return merge(job.comm.gather_objects(rows), job.hosts)


def _machine(job: Job) -> list[Row]:
    rows = [agreement.ranks_row(job)]
    with deadline("versions, devices and clocks", agreement.COLLECTIVE_S):
        rows.append(attempt("versions", agreement.same_versions, job))
        rows.append(attempt("devices", agreement.same_devices, job))
        rows.append(attempt("clocks", agreement.clocks, job))
        rows.append(attempt("cores", _cores, job))
    return [
        *rows,
        attempt("shared memory", machine.shared_memory, job.local_ranks),
        attempt("open files", machine.open_files),
        attempt("temporary files", machine.temporary_files),
        attempt("compiler", machine.compiler, job.device.type),
        attempt("port", machine.master_port),
    ]


def _cores(job: Job) -> Row:
    return machine.cores(agreement.local_cores(job), job.device.type, machine.core_limit())


def _batch(config: Config, ranks: int) -> Row:
    student_ds_config(config, ranks)
    train = config.train
    found = (
        f"train.global_batch_samples {train.global_batch_samples} = {ranks} ranks x {config.micro_batches(ranks)} "
        f"micro-batches x {train.micro_batch_samples} samples"
    )
    return Row("batch", "pass", found)


def _inputs(config: Config, job: Job, known: Inputs | None) -> list[Row]:
    """Check models and shards one by one; then, if they are intact on all ranks, check that they fit together."""
    rows = []
    paths: dict[str, Path] = {}
    for key, model in (("student", config.student), ("teacher", config.teacher)):
        if model is not None:
            with deadline(f"{key} files", DOWNLOAD_S):
                rows.append(attempt(f"{key} files", _model, config, key, model.path, job, paths))
    rows.append(attempt("shards", _shards, config, known))
    together = []
    with deadline("models and shards", FILES_S):
        checked: list[Inputs] = []
        if not failed(rows):
            together.append(attempt("tokenizers and data", _fit, _with_local_models(config, paths), known, checked))
        if all(job.comm.gather_objects(bool(checked))):
            together += _with_inputs(config, job, checked[0])
        together.append(_on_rank_0(job, "newest checkpoint", path_checks.checkpoints, config, job.ranks))
    return [*rows, *_model_checks(config, job, paths), *together]


def _model(config: Config, key: str, path: str, job: Job, paths: dict[str, Path]) -> Row:
    call_together(job.comm, lambda: config.check_paths(f"{key}.path"))
    directory = model_directory(path, f"{key}.path", job.comm, config.path_note(f"{key}.path"))
    row = path_checks.model_files(directory, key)
    if row.status == "pass":
        if key == "teacher" and config.teacher is not None:
            skipped_layers(config.teacher, read_model(directory, "teacher.path").num_layers)
        paths[key] = directory
    return row


def _shards(config: Config, known: Inputs | None) -> Row:
    config.check_paths("data.path")
    manifest = load_manifest(open_store(config.data)) if known is None else known.manifest
    samples = sum(domain.train.samples for domain in manifest.domains.values())
    found = f"data.path {config.data.path}: {len(manifest.domains)} domains, {samples:,} training samples, sizes fit"
    return Row("shards", "pass", found)


def _with_local_models(config: Config, paths: dict[str, Path]) -> Config:
    """Return the configuration for `check_inputs`, with local model paths and a batch that always passes."""
    student = config.student.model_copy(update={"path": str(paths["student"])})
    teacher = config.teacher and config.teacher.model_copy(update={"path": str(paths["teacher"])})
    train = config.train.model_copy(update={"micro_batch_samples": 1})
    return config.model_copy(update={"student": student, "teacher": teacher, "train": train})


def _fit(config: Config, known: Inputs | None, checked: list[Inputs]) -> Row:
    checked.append(known or check_inputs(config, SingleProcess()))
    return same_tokenizers(checked[0])


def _model_checks(config: Config, job: Job, paths: dict[str, Path]) -> list[Row]:
    """Check precision, memory and disks, which need the models alone. Not collective."""
    models = {key: read_model(directory, f"{key}.path") for key, directory in paths.items()}
    rows = [
        attempt(f"{key} precision", path_checks.precision, config, model, key, job.device)
        for key, model in models.items()
    ]
    if "student" not in models or (config.teacher is not None and "teacher" not in models):
        return rows
    student = model_shape(models["student"])
    teacher = model_shape(models["teacher"]) if "teacher" in models else None
    rows.append(attempt("host memory", _memory, config, job, student, teacher, "host"))
    if job.device_type == "cuda":
        rows.append(attempt("device memory", _memory, config, job, student, teacher, "device"))
    rows.append(attempt("disk for checkpoints", path_checks.checkpoint_space, config, student))
    if config.train.nvme_path is not None:
        rows.append(attempt("disk for offloading", path_checks.nvme_space, config, job, student, teacher))
    return rows


def _memory(config: Config, job: Job, student: ModelShape, teacher: ModelShape | None, place: str) -> Row:
    # By the head, which is never smaller than the tokenizer: an unreadable tokenizer has a row of its own.
    vocab_size = student.head // max(1, student.hidden)
    settled = config
    if job.device.type == job.device_type:  # else nobody knows what will be free
        usable = MEMORY_MARGIN * machine.free_bytes(job.device, job.local_ranks)
        fits = fits_into(usable, (student, teacher), vocab_size, job.ranks, job.local_ranks, job.device_type)
        settled = settled_place(config, fits)
    estimate = estimate_memory(settled, student, teacher, vocab_size, job.ranks, job.device_type, job.local_ranks)
    if place == "device" and job.device.type != "cuda":
        found = f"estimated {machine.size(estimate.device_bytes)} of a GPU, and this machine has none"
        return Row("device memory", "warn", found, "see if it fits with `ddk plan`; every job checks it again")
    if place == "device":
        row = machine.device_memory(estimate, job.device, job.ranks)
    else:
        row = machine.host_memory(estimate, job.device_type, job.ranks, job.local_ranks)
    if settled is config or settled.teacher is None:
        return row
    return replace(row, found=f"{row.found}; teacher.shard_within: auto is {settled.teacher.shard_within} here")


def _with_inputs(config: Config, job: Job, inputs: Inputs) -> list[Row]:
    """Check the same inputs on all ranks, the samples, the run's directory, and the space for the data cache."""
    rows = [
        attempt("same files on all ranks", agreement.same_files, job, inputs.fingerprints),
        attempt("samples of domains", domain_samples, config, inputs),
        _on_rank_0(job, "run directory", path_checks.run_directory, config, inputs.fingerprints),
    ]
    if config.teacher is not None and config.teacher.cache is not None:
        rows.append(_on_rank_0(job, "teacher's cache", teacher_rows.teacher_cache, config, inputs, job.ranks))
    if config.data.cache_dir is not None:
        rows.append(attempt("disk for the data cache", path_checks.cache_space, config, inputs.manifest, inputs.names))
    return rows


def _on_rank_0(job: Job, name: str, check: Callable[..., Row], *arguments: Any) -> Row:
    """Return rank 0's row of `check` on all ranks: thousands of ranks must not look at every file of a checkpoint."""
    row: Row = job.comm.broadcast_object(attempt(name, check, *arguments) if job.comm.rank == 0 else None)
    return row
