"""The student as a Hugging Face directory that plain transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from ddk_ds.comm import Comm
from ddk_ds.engine.model_files import ModelFiles
from ddk_ds.engine.models import Student
from ddk_ds.engine.weights import save_weights

# Everything of the source directory that is not weights: tokenizer, generation settings, code of the model.
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")


def export_student(
    student: Student, files: ModelFiles, directory: Path, comm: Comm, poll: Callable[[], None] = lambda: None
) -> None:
    """Write weights (training dtype, bounded shards), config and tokenizer to `directory`. Collective.

    One tensor at a time is gathered; `directory` appears whole or not at all, and an earlier export is replaced.
    `poll` is called before each tensor; what it raises on all ranks ends the export.
    """
    partial = directory.with_name(f".partial-{directory.name}")
    if comm.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for pattern in _COPIED:
            for source in files.directory.glob(pattern):
                if source.name not in ("config.json", "model.safetensors.index.json"):
                    shutil.copyfile(source, partial / source.name)
        dtype = str(next(iter(student.parameters.values())).dtype).removeprefix("torch.")
        (partial / "config.json").write_text(json.dumps({**files.config, "dtype": dtype}, indent=2))
    save_weights(student.parameters, partial, comm, poll)
    if comm.rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    comm.barrier()
