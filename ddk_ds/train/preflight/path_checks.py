"""Checks of paths that a run reads and writes: model files, its directory and checkpoints, space on disks."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ddk_ds.config import Config
from ddk_ds.data.manifest import SPLITS, Manifest
from ddk_ds.engine.eight_bits import product_fault
from ddk_ds.engine.memory_estimate import OPTIMIZER_BYTES, shard_ranks
from ddk_ds.engine.model_files import COMPUTE_BYTES, COPY_AGAIN, ModelFiles, ModelShape, read_model
from ddk_ds.files import nearest_existing, read_object
from ddk_ds.train.checkpoint.checkpoint_files import MANIFEST, complete_checkpoints, newest_checkpoint
from ddk_ds.train.preflight.agreement import Job
from ddk_ds.train.preflight.machine import size
from ddk_ds.train.preflight.rows import Row, judged
from ddk_ds.train.run_dir import check_run_dir, run_identity

_OF = re.compile(r"-of-(\d+)\.safetensors$")
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def model_files(directory: Path, key: str) -> Row:
    """Check that each safetensors file exists with the size in its header, and that index and config.json fit to them.

    Raises UserError if they cannot be read.
    """
    name, files = f"{key} files", read_model(directory, f"{key}.path")
    paths = sorted({tensor.file for tensor in files.tensors.values()})
    fault = next(filter(None, map(_cut_short, paths)), "") or _index_fault(files, paths) or _layer_fault(files)
    num_bytes = sum(path.stat().st_size for path in paths)
    found = f"{key}.path: {fault}" if fault else f"{directory}: {len(paths)} safetensors, {size(num_bytes)}, complete"
    return judged(name, found, fail=bool(fault), fix=COPY_AGAIN)


def _cut_short(path: Path) -> str:
    try:  # with framework "pt" it would map the file as writable memory, which a small machine refuses
        with safe_open(path, framework="np"):
            return ""
    except SafetensorError as error:
        return f"{path} has {path.stat().st_size:,} bytes, which is not what its header says: {error}"


def _index_fault(files: ModelFiles, paths: list[Path]) -> str:
    index = files.directory / "model.safetensors.index.json"
    if not index.is_file():
        return ""
    numbers = [int(match[1]) for path in paths if (match := _OF.search(path.name))]
    if numbers and len(paths) < max(numbers):
        return f"{index} names {len(paths)} of the {max(numbers)} files that their names count"
    held = files.stored_names
    for tensor, file in json.loads(index.read_text())["weight_map"].items():
        if tensor not in held:
            return f"{index} names tensor {tensor} in {file}, which does not hold it"
    return ""


def _layer_fault(files: ModelFiles) -> str:
    layers = files.config.get("num_hidden_layers")
    numbers = {int(match[1]) for name in files.tensors if (match := _LAYER.search(name))}
    if layers is None or not numbers or set(range(layers)) <= numbers:
        return ""
    absent = min(set(range(layers)) - numbers)
    return f"{files.directory}: config.json has {layers} layers, the weights have none of layer {absent}"


def precision(config: Config, files: ModelFiles, key: str, device: torch.device) -> Row:
    """Return a row that fails if the GPU cannot compute in `train.precision`, or multiply in the teacher's 8 bits.

    It warns if float16 weights lose bits in bf16.
    """
    name, wanted = f"{key} precision", config.train.precision
    stored = {tensor.dtype for tensor in files.tensors.values()}
    read = ", read as the numbers that they stand for" if files.quantized else ""
    found = f"stored as {', '.join(sorted(stored))}{read}, computed in train.precision {wanted}"
    if wanted == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        gpu = torch.cuda.get_device_name(device)
        return Row(name, "fail", f"{found}, which {gpu} does not have", "train.precision=fp32, or other GPUs")
    if key == "teacher" and config.loads_teacher and (fault := product_fault(config.teacher, device)):
        return Row(name, "fail", fault, "teacher.quantize=int8, or other GPUs")
    fix = "fp16 weights lose three bits in bf16; train.precision=fp32 keeps them"
    return judged(name, found, fail=False, warn=wanted == "bf16" and "F16" in stored, fix=fix)


def run_directory(config: Config, fingerprints: dict[str, Any]) -> Row:
    """Return a row that fails if a process runs in the run's directory; else it says if the directory is free.

    Must be called before `claim_run_dir`, because it would take this process's lock for another one's. `fingerprints`
    are those of models, tokenizer and data. Raises CheckpointError, as `check_run_dir` does, if the directory holds
    anything but this run.
    """
    check_run_dir(config, run_identity(config, fingerprints))
    lock = config.run_dir / ".lock"
    if lock.is_file():
        with lock.open() as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found = f"{config.run_dir}: {stream.read().strip() or 'another process'} is running in it"
                return Row("run directory", "fail", found, "stop that, or wait for its end")
            except OSError:  # a file system without locks
                pass
    state = "this run's" if (config.run_dir / "run.json").is_file() else "free"
    return Row("run directory", "pass", f"{config.run_dir} is {state}")


def checkpoints(config: Config, ranks: int) -> Row:
    """Check that the newest checkpoint is complete, by the sizes of its files, and that `ranks` ranks can load it."""
    name, root = "newest checkpoint", config.run_dir / "checkpoints"
    newest = newest_checkpoint(config.run_dir)
    last = max(root.glob("step-*"), default=None)
    if last is not None and (newest is None or newest[0] != last):
        choice = "none is complete" if newest is None else f"the run would continue from {newest[0].name}"
        found = f"{last}: {_fault_of(last)}; {choice}"
        return judged(name, found, fail=newest is None, warn=True, fix="put its files back, or move it away")
    if newest is None:
        return Row(name, "pass", "none: the run begins anew")
    wrote = newest[1].world_size
    found = f"{newest[0].name}, {size(newest[1].num_bytes)}, written by {wrote} ranks, the run has {ranks}"
    differs = wrote != ranks
    fails = differs and config.optimizer.offload == "nvme"
    fix = f"states on nvme stay on their nodes: start it on {wrote} ranks"
    return judged(name, found + (", so it is converted first" if differs else ""), fail=fails, fix=fix)


def _fault_of(directory: Path) -> str:
    try:
        files = read_object(directory / MANIFEST, "")["files"]
        for file, (expected, _) in sorted(files.items()):
            found = (directory / file).stat().st_size if (directory / file).is_file() else None
            if found != expected:
                has = "is missing" if found is None else f"has {found:,} bytes"
                return f"{file} {has}, {MANIFEST} says {expected:,}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    return f"its {MANIFEST} is of another format, or was changed"


def checkpoint_space(config: Config, student: ModelShape) -> Row:
    """Return a row that fails if the disk has no space for the checkpoints to keep, the export and a new checkpoint."""
    directory = nearest_existing(config.run_dir)
    compute = COMPUTE_BYTES[config.train.precision]
    each = (OPTIMIZER_BYTES + compute) * student.parameters
    keep = config.checkpoint
    count = keep.keep_last + 1
    if keep.keep_every_steps is not None and config.stop.steps is not None:
        count += config.stop.steps // keep.keep_every_steps
    existing = sum(manifest.num_bytes for _, manifest in complete_checkpoints(config.run_dir / "checkpoints"))
    needed = max(0, count * each - existing) + compute * student.parameters
    free = shutil.disk_usage(directory).free
    required = f"{count} checkpoints of {size(each)} and the export need {size(needed)} more"
    found = f"{directory} has {size(free)} free; {required}"
    fix = "free space there, lower checkpoint.keep_last, or set output_dir to another disk"
    return judged("disk for checkpoints", found, fail=free < needed, fix=fix)


def cache_space(config: Config, manifest: Manifest, names: list[str]) -> Row:
    """Return a row that fails if the disk of `data.cache_dir` has less space than the cache will grow by."""
    assert config.data.cache_dir is not None, "space was asked for a cache that is not there"
    splits = [getattr(manifest.domains[name], split) for name in names for split in SPLITS]
    places = sum(split.samples for split in splits) * manifest.sequence_length
    total = places * np.dtype(manifest.dtype).itemsize
    limit = config.data.cache_limit_gb
    needed = total if limit is None else min(total, int(limit * 1e9))
    directory = Path(config.data.cache_dir)
    cached = sum(path.stat().st_size for path in directory.rglob("*.mds"))
    free = shutil.disk_usage(nearest_existing(directory)).free
    found = f"data.cache_dir {directory} has {size(free)} free and holds {size(cached)}; it grows to {size(needed)}"
    fix = "free space there, or set data.cache_limit_gb to what there is"
    return judged("disk for the data cache", found, fail=free < needed - cached, fix=fix)


def nvme_space(config: Config, job: Job, student: ModelShape, teacher: ModelShape | None) -> Row:
    """Check that `train.nvme_path` can be written and has space for all that is offloaded to it."""
    directory = Path(config.train.nvme_path or "")
    compute = COMPUTE_BYTES[config.train.precision]
    needed = OPTIMIZER_BYTES * student.shard(job.ranks) if config.optimizer.offload == "nvme" else 0
    for model, shape in ((config.student, student), (config.teacher, teacher)):
        if model is not None and shape is not None and model.offload_params == "nvme":
            needed += compute * shape.shard(shard_ranks(model, job.ranks, job.local_ranks))
    needed *= job.local_ranks
    try:
        tempfile.TemporaryFile(dir=directory).close()
        free = shutil.disk_usage(directory).free
    except OSError as error:
        fix = "give a writable directory on each node's own disk"
        return Row("disk for offloading", "fail", f"train.nvme_path {directory}: {error.strerror}", fix)
    ranks = job.local_ranks
    found = f"train.nvme_path {directory} has {size(free)} free, needed are {size(needed)}; ranks on the node: {ranks}"
    return judged("disk for offloading", found, fail=free < needed, fix="free space there, or offload to cpu")
