"""The models and the data of a run, as far as a plan needs them: nothing is downloaded and no weight is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddk_ds.config import Config
from ddk_ds.config.run_config import corpus_samples, interval_steps, total_steps, total_steps_without_data
from ddk_ds.data.manifest import FILE_NAME, load_manifest
from ddk_ds.data.mds import token_dtype
from ddk_ds.data.store import LocalStore
from ddk_ds.engine.flops import active_weights, model_flops
from ddk_ds.engine.model_files import ModelFiles, ModelShape, configured_files, model_shape, read_model
from ddk_ds.errors import ConfigError

ASSUMED_DOMAINS = 10
"""Number of domains in the paper, taken where neither the configuration nor prepared data names them."""


@dataclass(frozen=True)
class PlannedModel:
    """A model as a plan sees it: the sizes of its weights and the FLOPs of a token."""

    shape: ModelShape
    forward_flops: float
    """FLOPs of one token's forward pass, with the full square of attention."""
    source: str
    """File or directory that was read, for messages."""
    active_weights: float = 0.0
    """Weights that a token is multiplied by; of a mixture of experts those of the experts that it is sent to."""

    @property
    def head_flops(self) -> float:
        """Return the part of `forward_flops` that the output head takes."""
        return 2.0 * self.shape.head


@dataclass(frozen=True)
class Models:
    """The two models of a plan, and the size of the vocabulary in the loss."""

    student: PlannedModel
    teacher: PlannedModel | None
    vocab_size: int


@dataclass(frozen=True)
class PlannedData:
    """The data of a run, and the length of the run that follows from it."""

    domains: int
    vocab_size: int
    """Tokens of the tokenizer; without prepared data the rows of the student's head, which are never fewer."""
    token_bytes: int
    """Bytes of one token in the shards."""
    shard_bytes: int
    """Bytes of all domains' tokens. Without prepared data: of all tokens that the run draws, and of validation."""
    steps: int
    """Optimizer steps of the run, unless stop.discrepancy ends it earlier."""
    intervals: int
    source: str
    """Origin of these numbers, for the plan's list of assumptions."""
    target_share: float = 1.0
    """Share of the samples' tokens that are targets, less than 1 with conversations."""

    @property
    def measurements(self) -> int:
        """Return the number of times that the student is measured: before each interval and at the end."""
        return self.intervals + 1


def find_inputs(config: Config, model_dirs: tuple[Path, ...]) -> tuple[Models, PlannedData]:
    """Find the models and the data that the configuration names; `model_dirs` hold `<model>.json` of hub names.

    Raises:
        ConfigError: a model is not found or not understood, or the run's length depends on data that is missing.
        DataError: domains.json exists and is broken, or lacks a domain.
    """
    length = config.data.sequence_length
    note = config.path_note
    student = find_model(config.student.path, "student.path", model_dirs, length, note("student.path"))
    teacher = None
    if config.teacher is not None:
        teacher = find_model(config.teacher.path, "teacher.path", model_dirs, length, note("teacher.path"))
    data = find_data(config, student.shape.head // max(1, student.shape.hidden))
    return Models(student, teacher, data.vocab_size), data


def find_model(path: str, key: str, model_dirs: tuple[Path, ...], sequence_length: int, note: str = "") -> PlannedModel:
    """Describe the model that `path` names, with the FLOPs of a token in a sequence of `sequence_length` tokens.

    `path` is a directory with weights, a directory with config.json alone, a config.json's own path, or a hub name
    whose `<last part>.json` lies in one of `model_dirs`. Raises ConfigError, naming the configuration `key`, where no
    file is found or it describes no causal language model; `note` says where the path begins.
    """
    place = Path(path)
    if (place / "model.safetensors").is_file() or (place / "model.safetensors.index.json").is_file():
        return _describe(read_model(place, key), sequence_length, f"headers of the weights in {place}")
    candidates = [place / "config.json", place, *(directory / f"{place.name}.json" for directory in model_dirs)]
    config_file = next((file for file in candidates if file.is_file()), None)
    if config_file is None:
        places = ", ".join(map(str, model_dirs))
        raise ConfigError(
            f"{key}: {path} is no directory with a config.json, and {place.name}.json is not in {places}: save the "
            f"model's config.json there, or give its path: {key}=path/to/config.json{note}"
        )
    return _describe(_configured(config_file, key), sequence_length, str(config_file))


def _describe(files: ModelFiles, sequence_length: int, source: str) -> PlannedModel:
    active = active_weights({name: tensor.shape for name, tensor in files.tensors.items()}, files.config)
    return PlannedModel(model_shape(files), model_flops(files, sequence_length, causal=False), source, active)


def _configured(config_file: Path, key: str) -> ModelFiles:
    try:
        return configured_files(config_file)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{key}: {config_file} cannot be read as JSON: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{key}: {config_file} describes no causal language model that transformers can build: {reason}. It must "
            "be a complete config.json with its model_type; for a model with code of its own, give the directory with "
            "weights"
        ) from error


def find_data(config: Config, head_rows: int) -> PlannedData:
    """Take sizes from domains.json where it exists, and from the configuration alone otherwise.

    `head_rows` is the number of rows of the student's head. Raises ConfigError where the run's length depends on data
    that is missing, DataError where domains.json is broken or lacks a domain.
    """
    if (Path(config.data.path) / FILE_NAME).is_file():
        return _prepared_data(config)
    return _assumed_data(config, head_rows)


def _prepared_data(config: Config) -> PlannedData:
    manifest = load_manifest(LocalStore(config.data.path))
    names = config.data.domains or tuple(manifest.domains)
    manifest.require(names)
    domains = [manifest.domains[name] for name in names]
    sizes = {name: manifest.domains[name].train.samples for name in names}
    steps = total_steps(config, corpus_samples(config.mixture, sizes))
    token_bytes = np.dtype(manifest.dtype).itemsize
    places = [manifest.sequence_length * domain.train.samples for domain in domains]
    targets = [domain.train.target_tokens for domain in domains]
    of_places = [count if one < 0 else one for count, one in zip(places, targets, strict=True)]
    return PlannedData(
        domains=len(names),
        vocab_size=manifest.vocab_size,
        token_bytes=token_bytes,
        shard_bytes=token_bytes
        * manifest.sequence_length
        * sum(domain.train.samples + domain.validation.samples for domain in domains),
        steps=steps,
        intervals=_num_intervals(config, steps),
        source=f"{Path(config.data.path) / FILE_NAME}",
        target_share=sum(of_places) / sum(places),
    )


def _assumed_data(config: Config, head_rows: int) -> PlannedData:
    if config.stop.steps is None and config.stop.intervals is None:
        raise ConfigError(
            f"stop: the run ends with its data, and data.path {config.data.path} holds no {FILE_NAME} here: give "
            f"stop.steps=N, or data.path=DIR of the prepared shards{config.path_note('data.path')}"
        )
    steps = total_steps_without_data(config)
    domains = len(config.data.domains) if config.data.domains is not None else ASSUMED_DOMAINS
    token_bytes = np.dtype(token_dtype(head_rows)).itemsize
    samples = steps * config.train.global_batch_samples + domains * config.data.validation_samples
    named = "data.domains" if config.data.domains is not None else f"assumed: {ASSUMED_DOMAINS} domains, as the paper"
    return PlannedData(
        domains=domains,
        vocab_size=head_rows,
        token_bytes=token_bytes,
        shard_bytes=token_bytes * samples * config.data.sequence_length,
        steps=steps,
        intervals=_num_intervals(config, steps),
        source=f"{named}; no prepared data in data.path {config.data.path}: as much as the run draws"
        f"{config.path_note('data.path')}",
    )


def _num_intervals(config: Config, steps: int) -> int:
    steps_done = count = 0
    while steps_done < steps:
        steps_done += interval_steps(config.mixture, count)
        count += 1
    return count
