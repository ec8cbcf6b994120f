"""Where an export goes: it appears whole or not at all, and takes the place of an export of ours alone.

Each holds ddk_ds_export.json with its files: one that has been changed, such as a card that was filled in, is known.

The student as a Hugging Face directory that plain transformers loads: from a run in training, or a checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ddk_ds.comm import Comm
from ddk_ds.engine.model_files import ModelFiles
from ddk_ds.engine.process_memory import freed_at_once
from ddk_ds.engine.student import Student, names_on_disk
from ddk_ds.engine.weights import TensorSpec, save_weights, write_tensors
from ddk_ds.engine.zero_shards import UniversalShards, ZeroShards
from ddk_ds.errors import CheckpointError
from ddk_ds.files import nearest_existing, new_directory, size_and_xxh64

NOTE = "ddk_ds_export.json"


def check_target(directory: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError where `directory` is there and may not be replaced.

    An export as we wrote it may be. With `overwrite` any model's directory.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"--out {directory} exists and is no model's directory: name another")
    changed = _changed(directory)
    if changed and not overwrite:
        raise CheckpointError(
            f"--out {directory} exists, and {changed}: name another, or replace all of it with --overwrite"
        )


def check_room(directory: Path, needed_bytes: int) -> None:
    """Raise CheckpointError where the disk of `directory` has less than `needed_bytes` free."""
    place = nearest_existing(directory)
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise CheckpointError(
            f"--out {directory}: the export takes {needed_bytes:,} bytes, {place} has {free:,} free: make room, or "
            "name another disk"
        )


@contextmanager
def new_export(directory: Path, about: dict[str, Any]) -> Iterator[Path]:
    """Yield an empty directory that becomes `directory` when the block ends, and is removed after an error.

    `about` goes into the note next to the files. Raises UserError where another process writes the same directory.
    """
    with new_directory(directory, replace=True) as partial:
        yield partial
        (partial / NOTE).write_text(json.dumps({**about, "files": _files(partial)}, indent=1))


def _files(directory: Path) -> dict[str, list[int | str]]:
    """Bytes of every file, and the xxh64 of those that are not weights: whoever changes weights changes others too."""
    found: dict[str, list[int | str]] = {}
    for path in sorted(directory.iterdir()):
        if path.name != NOTE:
            weights = path.suffix == ".safetensors"
            found[path.name] = [path.stat().st_size] if weights else list(size_and_xxh64(path))
    return found


def _changed(directory: Path) -> str:
    """What tells that this is not an export as we wrote it, or ""."""
    try:
        noted = json.loads((directory / NOTE).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "is no export of ours"
    found = {} if any(path.is_dir() for path in directory.iterdir()) else _files(directory)
    differing = sorted(name for name in {**noted, **found} if noted.get(name) != found.get(name))
    return f"{differing[0]} in it is not as we wrote it" if differing else ""


# Everything of the source directory that is not weights: tokenizer, generation settings, code and licence of the model.
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("config.json", "model.safetensors.index.json", NOTE)
# Of TED's filters, which are beside the student in its engine.
_FILTERS = "filters."


@dataclass(frozen=True)
class Companions:
    """What an export holds beside its weights."""

    files: ModelFiles
    """The model that the run began with: configuration, tokenizer, generation settings."""
    card: str
    """README.md."""
    about: dict[str, Any]
    """Goes into the export's note: which run and step."""

    def write(self, directory: Path, dtype: torch.dtype) -> None:
        """Write all of it, for weights of that type."""
        for source in self.sources():
            shutil.copyfile(source, directory / source.name)
        config = {key: value for key, value in self.files.config.items() if key != "torch_dtype"}
        config["dtype"] = str(dtype).removeprefix("torch.")
        (directory / "config.json").write_text(json.dumps(config, indent=2))
        (directory / "README.md").write_text(self.card, encoding="utf-8")

    def sources(self) -> list[Path]:
        """The files that are copied."""
        found = {path for pattern in _COPIED for path in self.files.directory.glob(pattern) if path.is_file()}
        return sorted(path for path in found if path.name not in _NOT_COPIED)


def export_student(
    student: Student,
    directory: Path,
    comm: Comm,
    companions: Callable[[], Companions],
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Write the student in training to `directory`, in its training dtype. Collective.

    One tensor at a time is gathered; `directory` appears whole or not at all, and an earlier export is replaced.
    `companions` is called on rank 0. `poll` is called before each tensor; what it raises on all ranks ends the export.
    """
    with ExitStack() as stack:
        partial = directory
        if comm.rank == 0:
            beside = companions()
            partial = stack.enter_context(new_export(directory, beside.about))
            beside.write(partial, next(iter(student.parameters.values())).dtype)
        save_weights(student.parameters, partial, comm, poll)
    comm.barrier()


class CheckpointExport:
    """The student as a checkpoint has it, without a GPU or a process group, one tensor in memory at a time.

    Trained weights are the float32 masters; frozen ones, which no checkpoint holds, come from the student's own files.
    """

    def __init__(
        self, shards: ZeroShards | UniversalShards, files: ModelFiles, dtype: torch.dtype, *, trusted: bool
    ) -> None:
        """Raises CheckpointError where checkpoint and student are not a pair."""
        self._shards = shards
        self._files = files
        self._dtype = dtype
        self._names = {on_disk: name for name, on_disk in names_on_disk(files, trusted=trusted).items()}
        shapes = {name: tuple(shape) for name, shape in shards.shapes.items() if not name.startswith(_FILTERS)}
        wanted = {name: files.tensors[on_disk].shape for on_disk, name in self._names.items()}
        differing = sorted(name for name, shape in shapes.items() if wanted.get(name) != shape)
        if differing:
            name = differing[0]
            raise CheckpointError(
                f"{files.directory}: has no {name} of shape {shapes[name]}, which the checkpoint has: it is not the "
                "model that the run began with; name that by --student"
            )
        self.specs = {on_disk: TensorSpec(wanted[name], dtype) for on_disk, name in self._names.items()}
        """By name on the disk."""

    @property
    def num_bytes(self) -> int:
        """Of the weights."""
        return sum(spec.num_bytes for spec in self.specs.values())

    def write(self, directory: Path, companions: Companions, max_shard_bytes: int, done: Callable[[int], None]) -> None:
        """Write `directory`, which appears whole or not at all. `done` gets the bytes of each tensor."""
        with new_export(directory, companions.about) as partial, freed_at_once():
            companions.write(partial, self._dtype)
            write_tensors(partial, self.specs, self._tensors(done), max_shard_bytes)

    def _tensors(self, done: Callable[[int], None]) -> Iterator[torch.Tensor]:
        trained = self._shards.shapes
        for on_disk, spec in self.specs.items():
            name = self._names[on_disk]
            if name in trained:
                yield self._shards.read(name, dtype=self._dtype).reshape(spec.shape)
            else:
                with safe_open(self._files.tensors[on_disk].file, framework="pt") as reader:
                    yield reader.get_tensor(on_disk).to(self._dtype)
            done(spec.num_bytes)
