"""What is kept of a run's teacher: its perplexities, and its distributions (section teacher.cache)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ddk_ds.comm import Comm, call_together
from ddk_ds.config import Config
from ddk_ds.data.loader import MixtureDataset, validation_batches
from ddk_ds.data.teacher_cache import CONDITIONS_FILE, PERPLEXITIES, TeacherCache, make_cache
from ddk_ds.data.teacher_perplexities import PerplexityCache
from ddk_ds.data.teacher_place import LocalPlace, Place, open_place
from ddk_ds.data.teacher_samples import bytes_a_token
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.split_check import check_documents, check_split
from ddk_ds.engine.stage_clock import StageClock
from ddk_ds.engine.student import Student
from ddk_ds.engine.teacher import Teacher, load_teacher
from ddk_ds.errors import ConfigError, DataError
from ddk_ds.kernels import Options, default_chunk_tokens
from ddk_ds.methods import CachedTeacher
from ddk_ds.train.inputs import Inputs
from ddk_ds.train.interval import Array
from ddk_ds.train.progress import RunProgress
from ddk_ds.train.validation import (
    ValidationBatches,
    count_micro_batches,
    perplexities,
    perplexity_conditions,
)
from ddk_ds.train.watchdog import Watchdog
from ddk_ds.version import versions


def open_cache(config: Config, inputs: Inputs, dataset: MixtureDataset, comm: Comm) -> CachedTeacher | None:
    """Open the run's cache of its teacher; return None without the section teacher.cache. Collective.

    Raises ConfigError, DataError or CheckpointError on every rank if it is of another teacher or other samples,
    damaged, or cannot be written.
    """
    section = None if config.teacher is None else config.teacher.cache
    if section is None:
        return None
    if section.keep == "topk" and section.top_k > inputs.vocabulary.size:
        raise ConfigError(
            f"teacher.cache.top_k is {section.top_k}: the vocabulary has {inputs.vocabulary.size:,} tokens; lower it"
        )
    place = open_place(section.path, config.data)
    if config.loads_teacher:
        call_together(comm, lambda: make_cache(place, cache_conditions(config, inputs)) if comm.rank == 0 else None)
    else:
        call_together(comm, lambda: _require(place))
    store = call_together(comm, lambda: open_samples(place, config, inputs, dataset))
    return CachedTeacher(
        store,
        dataset,
        section,
        comm,
        micro_batch=config.train.micro_batch_samples,
        pass_size=config.teacher_pass_size,
        looks_ahead=config.data.cache_dir is None,  # a remote shard may not be there yet, and must not be waited for
    )


def open_samples(place: Place, config: Config, inputs: Inputs, dataset: MixtureDataset) -> TeacherCache:
    """Open what a run's cache has at `place`. Raises ConfigError or DataError as TeacherCache does."""
    shas = dict(zip(dataset.names, dataset.shas, strict=True))
    return TeacherCache(place, cache_conditions(config, inputs), shas, inputs.vocabulary.size, inputs.teachers)


def _require(place: Place) -> None:
    if place.read(CONDITIONS_FILE) is None:
        raise ConfigError(
            f"teacher.cache.path {place.location}: there is no cache, and teacher.cache.mode is read_only: "
            "ddk teach makes and fills one, and so does a run with write_through"
        )


def cache_conditions(config: Config, inputs: Inputs) -> dict[str, Any]:
    """Return all that what is kept of a teacher depends on, but for itself and the samples, which parts name."""
    documents = {"documents": "masked"} if inputs.masked else {}  # a cache of before has joined ones
    return {"vocab_size": inputs.vocabulary.size, **documents, **config.cache_conditions()}


def most_bytes(config: Config, inputs: Inputs, samples: int) -> float:
    """Return the bytes that so many samples take in the cache at most."""
    assert config.teacher is not None and config.teacher.cache is not None
    section = config.teacher.cache
    of_token = bytes_a_token(section.keep, section.tokens, inputs.vocabulary.size)
    return samples * config.data.sequence_length * of_token


def held_out(config: Config, inputs: Inputs, comm: Comm) -> ValidationBatches:
    """Return this rank's share of the held-out samples. Raises DataError as `validation_batches` does."""
    return validation_batches(
        inputs.store,
        inputs.names,
        num_samples=config.data.validation_samples,
        **config.reader(comm.rank, comm.world_size),
        micro_batch=config.train.micro_batch_samples,
        vocab_size=inputs.vocabulary.size,
        masked=inputs.masked,
    )


def check_loaded(model: Student | Teacher, input_ids: torch.Tensor, inputs: Inputs, key: str, comm: Comm) -> None:
    """Raise ConfigError unless a loaded model computes as the run takes it to, tried on ids (B, L). Collective."""
    check_split(model, input_ids, inputs.vocabulary.size, key, comm)
    if inputs.masked:
        check_documents(model, input_ids, inputs.vocabulary.size, key, comm)


def start_teacher(
    config: Config,
    inputs: Inputs,
    identity: dict[str, Any],
    runtime: Runtime,
    watchdog: Watchdog,
    validation: ValidationBatches,
    options: Options,
    clock: StageClock,
    progress: RunProgress,
) -> tuple[Teacher | None, Array | None]:
    """Load the run's teacher and check it; return it and its perplexities (N,). Collective.

    The teacher is None if the run only reads what it has said; in a run without one both are None. Raises ConfigError
    if it cannot be loaded or is not as it seems, DataError if its perplexities are not there.
    """
    if inputs.teacher is None:
        return None, None
    teacher, comm, device = None, runtime.comm, runtime.device
    if config.loads_teacher:
        teacher = load_teacher(config, inputs.teacher, options.vocab_size, comm, inputs.filters, clock)
        if teacher.unquantized:
            progress.say(f"teacher.quantize leaves as they were: {', '.join(teacher.unquantized)}")
        check_loaded(teacher, validation[0][0].input_ids.to(device), inputs, "teacher", comm)
    watchdog.watch("evaluation")
    found = _teacher_perplexities(config, inputs, identity, teacher, validation, options, runtime, progress)
    watchdog.watch("models")
    return teacher, found


def head_options(config: Config, vocab_size: int, device_type: str) -> Options:
    """Return the options of the kernel that all uses of a head in a run share."""
    chunk_tokens = config.loss.chunk_tokens or default_chunk_tokens(vocab_size, device_type)
    return Options(vocab_size, gamma=0.0, chunk_tokens=chunk_tokens, logits_dtype=config.loss.logits_dtype)


def _teacher_perplexities(
    config: Config,
    inputs: Inputs,
    identity: dict[str, Any],
    teacher: Teacher | None,
    validation: ValidationBatches,
    options: Options,
    runtime: Runtime,
    progress: RunProgress,
) -> Array:
    """Return the teacher's perplexities (N,). Collective.

    The teacher never changes, so values that were measured under the same conditions are read from a cache. Raises
    DataError if the teacher is not loaded and they are not there.
    """
    comm = runtime.comm
    more = {"options": asdict(options), "device": runtime.device.type, **versions()}
    place, caches = _perplexity_place(config), []
    for name in inputs.names:
        fingerprint, attention = inputs.teacher_of(name)
        of_domain = {**identity, "content.teacher": fingerprint, "content.attention.teacher": attention}
        caches.append(PerplexityCache(place, perplexity_conditions(of_domain, more)))
    domain_keys = [inputs.manifest.domains[name].validation.sha for name in inputs.names]
    values = comm.broadcast_object(
        [cache.read(key) for cache, key in zip(caches, domain_keys, strict=True)] if comm.rank == 0 else None
    )
    unknown = [i for i, value in enumerate(values) if value is None]
    if unknown:
        if teacher is None:
            raise _no_perplexities(place.location, [inputs.names[i] for i in unknown])
        unmeasured = [validation[i] for i in unknown]
        with progress.part("measuring the teacher", count_micro_batches(unmeasured)) as advance:
            measured = perplexities(
                teacher,
                unmeasured,
                options=options,
                device=runtime.device,
                comm=comm,
                advance=advance,
            )
        for i, value in zip(unknown, measured.tolist(), strict=True):
            values[i] = value
            if comm.rank == 0:
                caches[i].write(domain_keys[i], value)
    return np.array(values, np.float64)


def _perplexity_place(config: Config) -> Place:
    """Return the place of the teacher's measured perplexities: in its cache, or beside the runs."""
    section = None if config.teacher is None else config.teacher.cache
    if section is None:
        return LocalPlace(config.run_dir.parent / ".teacher-perplexities")
    return open_place(f"{section.path}/{PERPLEXITIES}", config.data)


def lacking_samples(config: Config, missing: Mapping[str, int], drawn: Mapping[str, int]) -> DataError:
    """Return the error of a cache that lacks samples of a run which only reads.

    Args:
        missing: number of samples of each domain that the cache lacks.
        drawn: samples of each domain that the run draws up to the end of its next interval.
    """
    assert config.teacher is not None and config.teacher.cache is not None
    shown = ", ".join(f"{count:,} of {name}" for name, count in missing.items())
    again, mode = "start the run again with teacher.cache.mode=write_through, or ", " teacher.cache.mode=write_through"
    if config.teacher.by_domain:  # a run loads one teacher at most
        again = mode = ""
    samples, file = max(drawn[name] for name in missing), config.run_dir / "config.yaml"
    return DataError(
        f"teacher.cache.path {config.teacher.cache.path} lacks samples that the next interval draws: {shown}. "
        f"teacher.cache.mode is read_only: {again}first fill it: ddk teach --config {file} --samples {samples} "
        f"'data.domains=[{','.join(missing)}]'{mode}"
    )


def _no_perplexities(location: str, names: Sequence[str]) -> DataError:
    """Return the error of a cache without the teacher's perplexities of some domains."""
    return DataError(
        f"{location} has no perplexity of the teacher on the held-out samples of "
        f"{', '.join(names)} that was measured as this run would (models, data, options, versions), and "
        "teacher.cache.mode is read_only: ddk teach measures it, and so does a run with write_through"
    )
