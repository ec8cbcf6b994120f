"""Export of the student, in training or from a checkpoint, as a Hugging Face directory that transformers loads.

An export appears complete or not at all. It replaces an earlier export only if that is as it was written: each export
holds a note, ddk_ds_export.json, with the sizes and hashes of its files, which shows if one of them was changed, such
as a model card that a user has filled in. The command then refuses; a run's end moves what is there aside.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from ddk_ds.comm import Comm, call_together
from ddk_ds.engine.companion_files import COMPANIONS, copy_companions
from ddk_ds.engine.model_files import ModelFiles
from ddk_ds.engine.process_memory import freed_at_once
from ddk_ds.engine.student import Student, unloaded_student
from ddk_ds.engine.weights import TensorSpec, save_weights, write_tensors
from ddk_ds.engine.zero_shards import ZeroShards
from ddk_ds.errors import CheckpointError, UserError
from ddk_ds.files import nearest_existing, new_directory, read_object, size_and_xxh64, written

NOTE = "ddk_ds_export.json"
"""File name of an export's note."""
# Parameters of TED's filters, which are trained in the student's engine but are not part of the student.
_FILTERS = "filters."


@dataclass(frozen=True)
class Companions:
    """The files of an export apart from its weights, and the content of its note."""

    files: ModelFiles
    """The model that the run began with: source of configuration, tokenizer and generation settings."""
    card: str
    """Content of README.md, the model card."""
    about: dict[str, Any]
    """Entries of the export's note: the run and the step."""

    def write(self, directory: Path, dtype: torch.dtype) -> None:
        """Write these files, except the note, for weights of this `dtype`."""
        copy_companions(self.files.directory, directory, (*COMPANIONS, "*.py"))
        config = {key: value for key, value in self.files.config.items() if key != "torch_dtype"}
        config["dtype"] = str(dtype).removeprefix("torch.")
        (directory / "config.json").write_text(json.dumps(config, indent=2))
        (directory / "README.md").write_text(self.card, encoding="utf-8")


def export_student(
    student: Student,
    directory: Path,
    comm: Comm,
    companions: Callable[[], Companions],
    poll: Callable[[], None] = lambda: None,
    also: Callable[[Path], None] = lambda partial: None,
) -> Path | None:
    """Write the student in training to `directory`, in its training dtype. Collective.

    One tensor at a time is gathered. `directory` appears complete or not at all, and replaces an earlier export. What
    must not be replaced is renamed; rank 0 returns its new path.

    Args:
        companions: called on rank 0 alone.
        poll: called before each tensor on all ranks; if it raises on all of them, the export ends.
        also: called on all ranks with the directory that becomes `directory`; writes further files there. Collective.

    Raises:
        UserError: on every rank, if rank 0 cannot write.
    """
    moved: list[Path] = []
    buffers: dict[str, torch.Tensor] = {}

    def make_way() -> None:
        if unreplaceable(directory):
            moved.append(_move_aside(directory))

    with ExitStack() as stack:

        def begin() -> Path:
            with written(directory):
                other_files = companions()
                partial = stack.enter_context(new_export(directory, other_files.about, make_way))
                other_files.write(partial, next(iter(student.parameters.values())).dtype)
                buffers.update({name: other_files.files.read(name) for name in student.stored.buffers})
            return partial

        def end() -> None:
            with written(directory):
                stack.close()

        partial = call_together(comm, begin if comm.rank == 0 else lambda: directory)
        save_weights(student.parameters, student.stored.parameters, partial, comm, poll, buffers=buffers)
        also(partial)
        call_together(comm, end if comm.rank == 0 else lambda: None)
    return moved[0] if moved else None


class CheckpointExport:
    """Export of the student from a checkpoint, without a GPU or a process group, with one tensor in memory at a time.

    Trained weights are the float32 master weights. Frozen weights, which no checkpoint holds, and buffers are read from
    the files of the model that the run began with.
    """

    def __init__(self, shards: ZeroShards, files: ModelFiles, dtype: torch.dtype, *, trusted: bool) -> None:
        """Match the checkpoint's parameters with the tensors of `files`; the export will have this `dtype`.

        `trusted` permits Python code of the model's directory. Raises CheckpointError if names or shapes differ.
        """
        self._shards = shards
        self._files = files
        self._dtype = dtype
        self._stored, self._parameters = unloaded_student(files, trusted=trusted)
        shapes = {name: tuple(shape) for name, shape in shards.shapes.items() if not name.startswith(_FILTERS)}
        expected = {name: tuple(shape) for name, shape in self._parameters.values()}
        differing = sorted(name for name, shape in shapes.items() if expected.get(name) != shape)
        if differing:
            name = differing[0]
            raise CheckpointError(
                f"{files.directory}: has no {name} of shape {shapes[name]}, which the checkpoint has: it is not the "
                "model that the run began with; name that by --student"
            )
        self.specs = {
            name: TensorSpec(shape, dtype)
            for conversion in self._stored.parameters
            for name, shape in conversion.sources.items()
        }
        self.specs |= {name: TensorSpec.of(files.read(name)) for name in self._stored.buffers}
        """Shape and dtype of each tensor of the export, by its name on disk."""

    @property
    def num_bytes(self) -> int:
        """Return the size of the weights in bytes."""
        return sum(spec.num_bytes for spec in self.specs.values())

    def write(
        self,
        directory: Path,
        companions: Companions,
        max_shard_bytes: int,
        done: Callable[[int], None],
        *,
        overwrite: bool,
    ) -> None:
        """Write the export, which appears complete or not at all. `done` is called with the bytes of each tensor.

        Raises CheckpointError, as `check_target` does, if somebody has changed `directory` meanwhile.
        """

        def make_way() -> None:
            check_target(directory, overwrite=overwrite)

        with new_export(directory, companions.about, make_way) as partial, freed_at_once():
            companions.write(partial, self._dtype)
            write_tensors(partial, self.specs, self._tensors(done), max_shard_bytes)

    def _tensors(self, done: Callable[[int], None]) -> Iterator[torch.Tensor]:
        for name, tensor in zip(self.specs, chain(self._parameters_as_stored(), self._buffers()), strict=True):
            yield tensor
            done(self.specs[name].num_bytes)

    def _parameters_as_stored(self) -> Iterator[torch.Tensor]:
        trained = self._shards.shapes
        for conversion in self._stored.parameters:
            saved = {name: self._parameters[name][0] for name in conversion.targets}
            if all(name in trained for name in saved.values()):
                full = {
                    name: self._shards.read(saved[name], dtype=self._dtype).reshape(shape)
                    for name, shape in conversion.targets.items()
                }
                yield from conversion.to_files(full).values()
            else:
                yield from (self._files.read(name).to(self._dtype) for name in conversion.sources)

    def _buffers(self) -> Iterator[torch.Tensor]:
        return (self._files.read(name) for name in self._stored.buffers)


def check_target(directory: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if `directory` must not be replaced; with `overwrite` any that has a config.json can be."""
    reason = unreplaceable(directory)
    if reason and not (directory / "config.json").is_file():
        raise CheckpointError(f"--out {directory} exists and is no model's directory: name another")
    if reason and not overwrite:
        raise CheckpointError(
            f"--out {directory} exists, and {reason}: name another, or replace all of it with --overwrite"
        )


def unreplaceable(directory: Path) -> str:
    """Return why an export must not replace `directory`, as a part of a sentence, or "" if it may.

    It may replace an empty directory, and an export whose files are as they were written.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return ""
    noted = None
    with suppress(UserError):
        noted = read_object(directory / NOTE, "").get("files")
    if not isinstance(noted, dict):
        return "is no export of ours"
    files = _files(directory)
    differing = sorted(name for name in {**noted, **files} if noted.get(name) != files.get(name))
    return f"{differing[0]} in it is not as we wrote it" if differing else ""


def _move_aside(directory: Path) -> Path:
    """Rename a directory with files of the user's, next to it, and return its new path. Raises OSError."""
    numbers = (directory.with_name(f"{directory.name}-kept-{number}") for number in count(1))
    return directory.rename(next(path for path in numbers if not path.exists()))


def check_room(directory: Path, needed_bytes: int) -> None:
    """Raise CheckpointError if the disk of `directory` has less than `needed_bytes` free."""
    existing = nearest_existing(directory)
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise CheckpointError(
            f"--out {directory}: the export takes {needed_bytes:,} bytes, {existing} has {free:,} free: make room, or "
            "name another disk"
        )


@contextmanager
def new_export(directory: Path, about: dict[str, Any], make_way: Callable[[], None]) -> Iterator[Path]:
    """Yield an empty directory that becomes `directory` when the block ends, and is removed after an error.

    `about` goes into the note next to the files. `make_way` is called just before `directory` is replaced, and raises
    or renames it if that must not be. Raises UserError where another process writes the same directory.
    """
    with new_directory(directory, replace=True) as partial:
        yield partial
        (partial / NOTE).write_text(json.dumps({**about, "files": _files(partial)}, indent=1))
        make_way()


def _files(directory: Path) -> dict[str, list[int | str]]:
    """Return by name the bytes of each file, and the xxh64 of each that holds no weights; [] for a directory.

    Weights are not hashed because of their size; whoever changes them changes other files too.
    """
    files: dict[str, list[int | str]] = {}
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            files[path.name] = []
        elif path.name != NOTE:
            weights = path.suffix == ".safetensors"
            files[path.name] = [path.stat().st_size] if weights else list(size_and_xxh64(path))
    return files
