"""The cache of what the teacher says (section teacher.cache), opened for a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddk_ds.comm import Comm, call_together
from ddk_ds.config import Config
from ddk_ds.data.loader import MixtureDataset
from ddk_ds.data.teacher_cache import CONDITIONS_FILE, PERPLEXITIES, TeacherCache
from ddk_ds.errors import ConfigError, DataError
from ddk_ds.methods import CachedTeacher
from ddk_ds.train.inputs import Inputs


def open_cache(config: Config, inputs: Inputs, dataset: MixtureDataset, comm: Comm) -> CachedTeacher | None:
    """Open the run's cache of its teacher; return None without the section teacher.cache. Collective.

    Raises ConfigError, DataError or CheckpointError on every rank if it is of another teacher or other samples,
    damaged, or cannot be written.
    """
    section = None if config.teacher is None else config.teacher.cache
    if section is None:
        return None
    path, conditions = Path(section.path), _conditions(config, inputs)
    shas = dict(zip(dataset.names, dataset.shas, strict=True))

    def opened() -> TeacherCache:
        return TeacherCache(path, conditions, shas, inputs.vocabulary.size)

    if config.loads_teacher:
        call_together(comm, lambda: opened().prepare() if comm.rank == 0 else None)
    elif not (path / CONDITIONS_FILE).is_file():
        raise ConfigError(
            f"teacher.cache.path {path}: there is no cache, and teacher.cache.mode is read_only: set it to "
            "write_through, which makes and fills one"
        )
    return CachedTeacher(call_together(comm, opened), dataset, section.draws, section.seed, comm)


def _conditions(config: Config, inputs: Inputs) -> dict[str, Any]:
    """Return all that the teacher's draws depend on, but for the samples themselves."""
    assert config.teacher is not None and config.teacher.cache is not None and inputs.teacher is not None
    return {
        "teacher": inputs.teacher.fingerprint,
        "attention": inputs.attention["teacher"].kernel,
        "quantize": config.teacher.quantize,
        "precision": config.train.precision,
        "logits_dtype": config.loss.logits_dtype,
        "vocab_size": inputs.vocabulary.size,
        "sequence_length": config.data.sequence_length,
        "temperature": config.loss.temperature,
        "draws": config.teacher.cache.draws,
        "seed": config.teacher.cache.seed,
    }


def perplexity_directory(config: Config) -> Path:
    """Return the directory of the teacher's measured perplexities: in its cache, or beside the runs."""
    section = None if config.teacher is None else config.teacher.cache
    return config.run_dir.parent / ".teacher-perplexities" if section is None else Path(section.path) / PERPLEXITIES


def no_perplexities(config: Config, names: Sequence[str]) -> DataError:
    """Return the error of a cache without the teacher's perplexities of some domains."""
    return DataError(
        f"{perplexity_directory(config)} has no perplexity of the teacher on the held-out samples of "
        f"{', '.join(names)} that was measured as this run would (models, data, options, versions), and "
        "teacher.cache.mode is read_only: start once with teacher.cache.mode=write_through"
    )
